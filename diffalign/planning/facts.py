"""What a model known by its architecture is made of and takes, under a config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from diffalign.backends.toy import ToyPolicy, grid
from diffalign.config import Config
from diffalign.planning import architectures
from diffalign.planning.architectures import Row
from diffalign.processes import PROCESSES
from diffalign.runtime.randomness import Purpose, numpy_generator
from diffalign.types import Plan


@dataclass(frozen=True)
class Facts:
    """Of a model under a config. linear, other: parameters of the denoisers' linear layers and of all else in them; trained: of the LoRA,
    copies: how often it is there (itself, gradient, two moments, slow copies); encoders, decoder: parameters; encoded: numbers that one
    prompt's encoding has; rows: network rows that a sample takes at a step; row, decode: what one of each takes; plan: the first update's.
    """

    linear: int
    other: int
    trained: int
    copies: int
    encoders: float
    decoder: int
    encoded: int
    rows: int
    row: Row
    decode: Row
    plan: Plan


def parameters_of(modules: dict[str, Any], trained: dict[str, torch.Tensor]) -> tuple[int, int]:
    """Parameters of modules without the LoRA in them, and of the LoRA."""
    own = sum(p.numel() for p in trained.values())
    return sum(p.numel() for m in modules.values() for p in m.parameters()) - own, own


def toy(config: Config) -> ToyPolicy:
    """A chain with even levels, for what a model's own are not needed for."""
    sampler = config.sampler
    kind = PROCESSES[sampler.process].kind
    return ToyPolicy(process=sampler.process, noise_level=sampler.noise_level, levels=grid(kind, sampler.steps))


def facts(config: Config) -> Facts:
    """What a model known by its architecture takes of memory under a config.

    Raises:
        UserError: if the config does not say its height and width.
    """
    modules, trained = architectures.denoisers(config)
    rule, decoder = config.make_rule(), architectures.decoder(config)
    own = [layer for module in modules.values() for layer in module.modules() if isinstance(layer, torch.nn.Linear)]
    lora = {id(parameter) for parameter in trained.values()}
    linear = sum(layer.weight.numel() for layer in own if id(layer.weight) not in lora)
    parameters, added = parameters_of(modules, trained)
    return Facts(
        linear=linear,
        other=parameters - linear,
        trained=added,
        copies=4
        + len(rule.decays(0))
        + (config.optimizer.ema is not None)
        + (rule.needs.reference and config.reference != "base")
        + len(rule.needs.adapters),  # taken to be of the trained one's size
        encoders=float(architectures.entry(config)["encoders"]),
        decoder=decoder[1] if decoder else 0,
        encoded=architectures.encoded(config),
        rows=architectures.predictions(config),
        row=architectures.row(config, next(iter(modules.values()))),
        decode=decoder[0] if decoder else architectures.NOTHING,
        plan=rule.plan(toy(config).schedule, 0, numpy_generator(config.seed, Purpose.PLAN, 0)),
    )
