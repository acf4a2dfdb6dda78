"""LoRA through peft: attach, and switch off."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from diffalign.errors import UserError
from diffalign.models.products import TRAINED, make_lean

DENOISERS = ("transformer", "transformer_2", "unet")  # names diffusers gives the component that denoises
# Attention and feed-forward layers as diffusers' models name them; a target that a model does not have is no error.
TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    "to_qkv_mlp_proj",
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    *("ffn.net.0.proj", "ffn.net.2"),
    *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, notices or warnings from the libraries while files load: here they are known to be harmless."""
    from diffusers.utils import logging as ours
    from transformers.utils import logging as theirs

    levels = [(module, module.get_verbosity()) for module in (ours, theirs)]
    for module, _ in levels:
        module.set_verbosity(logging.CRITICAL)  # what goes wrong is raised, and told once
        module.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for module, level in levels:
            module.set_verbosity(level)
            module.enable_progress_bar()


def denoisers(pipe: Any) -> dict[str, Any]:
    """The pipeline's denoising components by name."""
    components = {name: getattr(pipe, name, None) for name in DENOISERS}
    return {name: module for name, module in components.items() if module is not None}


def attach(pipe: Any, rank: int, alpha: float, targets: Sequence[str] | None, seed: int) -> dict[str, Tensor]:
    """Add a LoRA of the given rank to every denoiser and return its parameters (float32, trainable) by name.

    Raises:
        UserError: if no layer carries a target's name.
    """
    parameters: dict[str, Tensor] = {}
    wanted = targets or TARGETS
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for component, module in denoisers(pipe).items():
            present = [t for t in wanted if any(n == t or n.endswith("." + t) for n, _ in module.named_modules())]
            missing = [t for t in targets or () if t not in present]
            if missing or not present:
                raise UserError(f"lora.targets: no layer of {component} is named {', '.join(missing or wanted)}")
            config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=present, init_lora_weights="gaussian")
            module.add_adapter(config)
            make_lean(module)
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
                    parameters[f"{component}.{name}"] = parameter
    return parameters


@contextmanager
def compared(pipe: Any, samples: int) -> Iterator[Callable[[], list[float]]]:
    """Run every network call a second time without adapters; what is yielded gives how far the predictions of each of `samples` samples
    were from the base model's on the same latents, sqrt(sum |v - v_base|^2 / sum |v_base|^2) over all calls since the beginning.

    Rows are samples, or the samples once for each guided prediction.
    """
    apart, size = torch.zeros(samples, dtype=torch.float64), torch.zeros(samples, dtype=torch.float64)

    def watched(forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)  # pipelines look at the signature
        def run(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            with disabled(with_lora):
                base = _squares(forward(*args, **kwargs))
            for total, rows in ((apart, _squares(output, base[0])[1]), (size, base[1])):
                total.add_(rows.double().cpu().reshape(-1, samples).sum(0))
            return output

        return run

    modules, with_lora = denoisers(pipe).values(), layers(pipe)
    plain = [module.forward for module in modules]
    for module, forward in zip(modules, plain, strict=True):
        module.forward = watched(forward)
    try:
        yield lambda: (apart / size).sqrt().tolist()
    finally:
        for module, forward in zip(modules, plain, strict=True):
            module.forward = forward


def _squares(output: Any, base: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A network's prediction (rows, D...), and the sum of squares of each row (rows,), of its difference to a base's if there is one."""
    first = output[0] if isinstance(output, (tuple, list)) else output if isinstance(output, Tensor) else output.sample
    rows = (torch.stack(list(first)) if isinstance(first, (list, tuple)) else first).detach().float()
    return rows, (rows if base is None else rows - base).square().flatten(1).sum(1)


def layers(pipe: Any) -> list[Any]:
    """The denoisers' layers that have LoRA."""
    return [layer for m in denoisers(pipe).values() for layer in m.modules() if isinstance(layer, BaseTunerLayer)]


@contextmanager
def acting(layers: Sequence[Any], names: Sequence[str]) -> Iterator[None]:
    """Loaded adapters in place of those that act, none: the base model, bit for bit; without gradient, for the length of the context.
    `layers` as `layers` lists them, which takes a walk through all modules.
    """
    was = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    with torch.no_grad():
        try:
            for layer in layers:  # peft's own switches also visit every parameter's requires_grad
                layer._active_adapter = list(names) or layer._active_adapter
                layer._disable_adapters = not names
            yield
        finally:
            for layer, (active, off) in zip(layers, was, strict=True):
                layer._active_adapter, layer._disable_adapters = active, off


def disabled(layers: Sequence[Any]) -> AbstractContextManager[None]:
    """The base model, bit for bit, without gradient; see `acting`."""
    return acting(layers, ())


def only_trained(pipe: Any) -> None:
    """Let the trained adapter act alone: the one that was loaded last acts too."""
    for layer in layers(pipe):
        layer._active_adapter = [TRAINED]
