"""LoRA through peft and diffusers: attach, switch off, save, load, and check what was saved."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from diffalign.files import LORA
from diffalign.types import Fault, UserError

DENOISERS = ("transformer", "transformer_2", "unet")  # names diffusers gives the component that denoises
# Attention and feed-forward layers as diffusers names them; a target that a model does not have is no error.
TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
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
    found = {name: getattr(pipe, name, None) for name in DENOISERS}
    return {name: module for name, module in found.items() if module is not None}


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
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
                    parameters[f"{component}.{name}"] = parameter
    return parameters


@contextmanager
def disabled(pipe: Any) -> Iterator[None]:
    """The base model, bit for bit, without gradient; `requires_grad` comes back as it was, on exceptions too."""
    layers = [layer for m in denoisers(pipe).values() for layer in m.modules() if isinstance(layer, BaseTunerLayer)]
    flags = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    was = [layer.disable_adapters for layer in layers]
    with torch.no_grad():
        try:
            for layer in layers:
                layer.enable_adapters(False)
            yield
        finally:
            for layer, off in zip(layers, was, strict=True):
                layer.enable_adapters(not off)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


def save(pipe: Any, folder: Path, notes: dict[str, str]) -> Path:
    """Write the trained LoRA in diffusers' layout with its alpha, and `notes` as the file's metadata."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    layers: dict[str, Any] = {}
    for component, module in denoisers(pipe).items():
        layers[f"{component}_lora_layers"] = get_peft_model_state_dict(module)
        # Without the config, alpha is lost and the file loads at another strength.
        config = module.peft_config["default"].to_dict()
        # Sets come in another order in every process, and equal adapters should be equal files.
        layers[f"{component}_lora_adapter_metadata"] = {
            key: sorted(value) if isinstance(value, set) else value for key, value in config.items()
        }
    folder.mkdir(parents=True, exist_ok=True)
    pipe.save_lora_weights(folder, **layers)
    path = folder / LORA
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata() or {})
    save_file(load_file(path), path, metadata={**metadata, **notes})
    _settle(path)
    return path


def _settle(path: Path) -> None:
    """Sort a safetensors file's metadata: the library writes it in another order every time, and equal adapters should be
    equal files. The format: eight bytes of length, a JSON header padded with spaces, the tensors."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[start:])


def verify(pipe: Any, folder: Path) -> None:
    """Load a saved LoRA beside the trained one and compare weights and scales.

    Raises:
        Fault: if anything differs; a bad file loads nothing, silently.
    """
    with quiet():
        pipe.load_lora_weights(folder, adapter_name="saved")
    try:
        loaded = pipe.get_list_adapters()
        for component, module in denoisers(pipe).items():
            if "saved" not in loaded.get(component, []):
                raise Fault(f"{folder / LORA}: loads nothing into {component}")
            for name, layer in module.named_modules():
                if isinstance(layer, BaseTunerLayer) and "default" in getattr(layer, "lora_A", {}):
                    _compare(name, layer, folder)
    finally:
        with quiet():
            pipe.delete_adapters("saved")


def _compare(name: str, layer: Any, folder: Path) -> None:
    # A half-precision pipeline loads the file in its own precision.
    same = layer.scaling.get("saved") == layer.scaling["default"] and all(
        "saved" in part and torch.equal(part["saved"].weight, part["default"].weight.to(part["saved"].weight.dtype))
        for part in (layer.lora_A, layer.lora_B)
    )
    if not same:
        raise Fault(f"{folder / LORA}: layer {name} differs from what was trained")


def load(pipe: Any, folder: Path, name: str) -> None:
    """Load a LoRA under a name.

    Raises:
        ValueError: if nothing of it fits the pipeline; diffusers itself loads nothing, silently.
    """
    from safetensors.torch import load_file

    if broken := [key for key, tensor in load_file(folder / LORA).items() if not tensor.isfinite().all()]:
        raise ValueError(f"{broken[0]} holds numbers that are not finite")
    with quiet():
        try:
            pipe.load_lora_weights(folder, adapter_name=name)
        except (RuntimeError, KeyError) as error:
            raise ValueError(" ".join(str(error).split())[:300]) from error
    if not any(name in names for names in pipe.get_list_adapters().values()):
        raise ValueError("it names no layer of this model")


def metadata(folder: Path) -> dict[str, str]:
    """The notes stored in a LoRA file."""
    from safetensors import safe_open

    with safe_open(folder / LORA, framework="pt") as file:
        return dict(file.metadata() or {})


def notes(**values: Any) -> dict[str, str]:
    """Values as safetensors metadata: strings."""
    return {
        key: value if isinstance(value, str) else json.dumps(value, sort_keys=True) for key, value in values.items()
    }
