"""Denoisers of models on the hub, built without weights or memory: what `diffalign plan` counts before anything is fetched.

`architectures.json`, by hub id: `denoisers`, name -> [diffusers' class, settings that differ from its defaults]; `inputs` of a
forward: shapes with sizes by name, {"list": shape} for a list of one tensor, {"value": ...} for what is no tensor; `latent`,
the shape of one sample; `text`, tokens of a prompt; `guidance`: cfg (a second prediction above 1), cfg0 (above 0), true_cfg
(true_cfg_scale above 1), embedded or none.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from diffalign.backends import adapters
from diffalign.config import Config
from diffalign.types import UserError

Sizes = dict[str, int]


@cache
def known() -> dict[str, Any]:
    """The table."""
    return json.loads((Path(__file__).parent / "architectures.json").read_text(encoding="utf-8"))


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
    found = {f"{key[0]}{by}": call[key] // by for key in ("height", "width") for by in (8, 16, 32)}
    frames = int(call.get("num_frames", 1))
    found |= {f"f{by}": (frames - 1) // by + 1 for by in (4, 8)}
    return found | {"text": int(call.get("max_sequence_length", known()[config.model]["text"]))}


def dimension(value: Any, given: Sizes) -> Any:
    """A number, a product of named sizes, or nested lists of them."""
    if isinstance(value, list):
        return [dimension(item, given) for item in value]
    return math.prod(given[name] for name in value.split("*")) if isinstance(value, str) else value


def predictions(config: Config) -> int:
    """Network rows that one sample takes at a step."""
    scale, kind = config.sampler.guidance_scale, known()[config.model]["guidance"]
    if kind == "true_cfg":
        return 2 if config.sampler.pipeline_args.get("true_cfg_scale", 1) > 1 else 1
    above = {"cfg": 1.0, "cfg0": 0.0}.get(kind, math.inf)
    return 2 if (scale is None and kind.startswith("cfg")) or (scale is not None and scale > above) else 1


def denoisers(config: Config) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The denoisers on the meta device with their LoRA, and its parameters."""
    import diffusers

    with torch.device("meta"), adapters.quiet():
        modules = {
            name: getattr(diffusers, kind)(**settings).requires_grad_(False)
            for name, (kind, settings) in known()[config.model]["denoisers"].items()
        }
        lora = config.lora
        trained = adapters.attach(SimpleNamespace(**modules), lora.rank, lora.alpha, lora.targets, config.seed)
    return modules, trained


def flops(config: Config, module: torch.nn.Module) -> tuple[float, float]:
    """FLOPs of one row: forward, and forward with all that its gradient takes."""
    from torch.utils.flop_counter import FlopCounterMode

    given = sizes(config)

    def made(spec: Any) -> Any:
        if isinstance(spec, list):
            return torch.ones(dimension(spec, given), device="meta")
        if "value" in spec:
            return dimension(spec["value"], given)
        return [made(spec["list"])] if "list" in spec else {key: made(value) for key, value in spec.items()}

    inputs = {key: made(spec) for key, spec in known()[config.model]["inputs"].items()}
    with FlopCounterMode(display=False) as counter:
        found = module(**inputs, return_dict=False)[0]
        forward = counter.get_total_flops()
        (torch.stack(found) if isinstance(found, list) else found).sum().backward()
        return forward, counter.get_total_flops()
