"""Denoisers of models on the hub, built without weights or memory: what `diffalign plan` counts before anything is fetched.

`architectures.json`, by hub id: `denoisers`, name -> [diffusers' class, settings that differ from its defaults]; `inputs` of a
forward: shapes with sizes by name, {"list": shape} for a list of one tensor, {"value": ...} for what is no tensor; `latent`,
the shape of one sample; `text`, tokens of a prompt; `guidance`: cfg (a second prediction above 1), cfg0 (above 0), true_cfg
(true_cfg_scale above 1), embedded or none; `encoders`, parameters of the text encoders; `decoder`, [class, settings, shape of what
it decodes], where it is known; `as`, the hub id of another entry whose facts these are, but for those that it has of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from diffalign.backends import guiding
from diffalign.config import Config
from diffalign.errors import UserError
from diffalign.models import lora as adapters
from diffalign.models import untrained
from diffalign.models.checkpointing import by_blocks
from diffalign.runtime.memory import Live

Sizes = dict[str, int]
# torch counts the product that is added in place for nothing.
flop_registry.setdefault(torch.ops.aten.addmm_, flop_registry[torch.ops.aten.addmm])


@cache
def known() -> dict[str, Any]:
    """The table, each entry in full."""
    table = json.loads((Path(__file__).parent / "architectures.json").read_text(encoding="utf-8"))
    return {model: {**table.get(own.get("as"), {}), **own} for model, own in table.items()}


@cache
def name_of(model: str) -> str | None:
    """The table's name of a hub id, or of a local folder whose denoisers are of the same class and settings; None if there is none."""
    if model in known():
        return model
    return next((name for name, facts in known().items() if _alike(Path(model), facts["denoisers"])), None)


def _alike(folder: Path, denoisers: dict[str, Any]) -> bool:
    """Whether a folder's denoisers are those of an entry, by their configs."""
    present = {name for name in adapters.DENOISERS if (folder / name / "config.json").is_file()}
    return present == set(denoisers) and all(
        untrained.alike(folder / name, kind, settings) for name, (kind, settings) in denoisers.items()
    )


def entry(config: Config) -> dict[str, Any]:
    """A config's model in the table."""
    return known()[str(name_of(config.model))]


def sizes(config: Config) -> Sizes:
    """Sizes that shapes name: h8 is height / 8, f4 the latent frames at four to one, text the tokens of a prompt.

    Raises:
        UserError: if the config does not say its height and width.
    """
    call = config.sampler.pipeline_args
    if missing := [key for key in ("height", "width") if not isinstance(call.get(key), int)]:
        raise UserError(
            f"sampler.pipeline_args: {' and '.join(missing)} missing; plan needs them for a model on the hub"
        )
    named = {f"{key[0]}{by}": call[key] // by for key in ("height", "width") for by in (8, 16, 32)}
    frames = int(call.get("num_frames", 1))
    named |= {f"f{by}": (frames - 1) // by + 1 for by in (4, 8)}
    return named | {"text": int(call.get("max_sequence_length", entry(config)["text"]))}


def dimension(value: Any, given: Sizes) -> Any:
    """A number, a product of named sizes, or nested lists of them."""
    if isinstance(value, list):
        return [dimension(item, given) for item in value]
    return math.prod(given[name] for name in value.split("*")) if isinstance(value, str) else value


def predictions(config: Config) -> int:
    """Network rows that one sample takes at a step."""
    scale, kind = config.sampler.guidance_scale, entry(config)["guidance"]
    if kind == "true_cfg":
        return 2 if config.sampler.pipeline_args.get("true_cfg_scale", 1) > 1 else 1
    above = {"cfg": 1.0, "cfg0": 0.0}.get(kind, math.inf)
    return 2 if (scale is None and kind.startswith("cfg")) or (scale is not None and scale > above) else 1


def unguided(config: Config) -> int:
    """Network rows that one sample takes at a step without guidance.

    Raises:
        UserError: if guidance is to be left out of some steps and is no second prediction.
    """
    steps, guided = config.sampler.guidance_steps, predictions(config)
    if steps is not None and guided < 2:
        true = ["true_cfg_scale"] if entry(config)["guidance"] in ("true_cfg", "embedded") else []
        raise guiding.refused(config.model, steps, true)
    return 1 if steps is not None else guided


def denoisers(config: Config) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The denoisers on the meta device with their LoRA, and its parameters."""
    with untrained.meta(config.precision):
        modules = {
            name: untrained.component(kind, settings) for name, (kind, settings) in entry(config)["denoisers"].items()
        }
        lora = config.lora
        trained = adapters.attach(SimpleNamespace(**modules), lora.rank, lora.alpha, lora.targets, config.seed)
    return modules, trained


@dataclass(frozen=True)
class Held:
    """Bytes that one sample takes beyond the weights: kept between its forward pass and its gradient, and the most at once."""

    kept: float
    peak: float


@dataclass(frozen=True)
class Row:
    """What one sample takes: FLOPs of the forward pass, of that and all that its gradient takes; bytes at once without a graph; memory with
    one, plain and block by block."""

    forward: float
    both: float
    quiet: float
    plain: Held
    blocks: Held


NOTHING = Row(0.0, 0.0, 0.0, Held(0.0, 0.0), Held(0.0, 0.0))


class _Flops(TorchDispatchMode):
    """torch's own formulas, summed; its FlopCounterMode also tracks modules, which takes longer than the passes themselves."""

    total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def _row(run: Callable[[], torch.Tensor], module: torch.nn.Module) -> Row:
    """Count what a function of a module on the meta device does, its gradient included; weights are not counted."""
    with _fused_attention():
        with _Flops() as flops:
            output = run()
            forward = flops.total
            output.sum().backward()
        with torch.no_grad(), Live() as live:
            run()
        plain = _held(run, module)
        blocks = plain
        if by_blocks(module):
            blocks = _held(run, module)
            module.disable_gradient_checkpointing()  # type: ignore[operator]
    return Row(forward, flops.total, float(live.peak), plain, blocks)


def _held(run: Callable[[], torch.Tensor], module: torch.nn.Module) -> Held:
    # Gradients of what is trained are counted with it: here they are there already.
    with Live() as live:
        output = run()
        kept = live.now
        output.sum().backward()
    return Held(float(kept), float(live.peak))


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Attention as a GPU does it, which keeps no N x N matrix; on the meta device torch would write it out. Masks change nothing here."""
    functional = torch.nn.functional
    plain = functional.scaled_dot_product_attention

    def fused(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, scale: float | None = None, **__: Any
    ) -> torch.Tensor:
        shared = query.shape[-3] // key.shape[-3]  # heads that use one key
        key, value = (x.repeat_interleave(shared, -3) for x in (key, value))
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)[0]

    functional.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = plain


def decoder(config: Config) -> tuple[Row, int] | None:
    """What decoding one sample takes, and the autoencoder's parameters; None where it is not known."""
    if "decoder" not in entry(config):
        return None
    kind, settings, shape = entry(config)["decoder"]
    with untrained.meta(config.precision):
        module = untrained.component(kind, settings)
        latent = torch.ones(dimension(shape, sizes(config)), requires_grad=True)
    row = _row(lambda: module.decode(latent, return_dict=False)[0], module)
    return row, sum(p.numel() for p in module.parameters())


def encoded(config: Config) -> int:
    """Numbers in the encoding of one prompt."""
    given = sizes(config)
    inputs = entry(config)["inputs"]
    specs = [inputs[name] for name in ("encoder_hidden_states", "pooled_projections", "cap_feats") if name in inputs]
    return sum(math.prod(dimension(spec["list"] if isinstance(spec, dict) else spec, given)) for spec in specs)


def row(config: Config, module: torch.nn.Module) -> Row:
    """What one row of a denoiser takes."""
    given = sizes(config)

    def made(spec: Any) -> Any:
        if isinstance(spec, list):
            return torch.ones(dimension(spec, given))
        if "value" in spec:
            return dimension(spec["value"], given)
        return [made(spec["list"])] if "list" in spec else {key: made(value) for key, value in spec.items()}

    with untrained.meta(config.precision):
        inputs = {key: made(spec) for key, spec in entry(config)["inputs"].items()}

    def run() -> torch.Tensor:
        output = module(**inputs, return_dict=False)[0]
        return torch.stack(output) if isinstance(output, list) else output

    return _row(run, module)
