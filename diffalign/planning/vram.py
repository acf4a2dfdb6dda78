"""`--vram N`: the cheapest way of using memory that fits a card of N GiB, by the same count that `plan` prints.

Only what changes no number of an update's geometry is changed: prompts, group size, steps, sizes of pictures and rank stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from diffalign import config as configs
from diffalign.config import Config
from diffalign.errors import UserError
from diffalign.planning import architectures
from diffalign.planning.demand import GIB, Demand, demand
from diffalign.planning.facts import Facts, facts
from diffalign.runtime.precision import PRECISIONS

CACHE = "runs/encoded"
# Cheapest in time first; each is taken besides those before it. What costs next to nothing comes before a smaller micro-batch, which a
# card's host pays for, and that before what costs.
FREE: tuple[dict[str, Any], ...] = (
    {},
    {"memory.decode": "sliced"},
    {"memory.judge_precision": "bfloat16"},
    {"memory.judges": "offloaded"},
)
DEAR: tuple[dict[str, Any], ...] = (
    {},
    {"memory.checkpoint": "blocks"},
    {"speed": "eager"},
    {"memory.quantize": "int8"},
    {"memory.quantize": "nf4"},
    {"memory.checkpoint": "both"},
)
GROWS, SHRINKS = 4, 4  # the micro-batch: at most, and before anything dear is done


@dataclass(frozen=True)
class Fitted:
    """What was changed, as a config's keys, and what a run with it takes."""

    chosen: dict[str, Any]
    demand: Demand
    facts: Facts


def fitted(name: str, overrides: tuple[str, ...], vram: float, ready: bool = True) -> tuple[Config, Fitted]:
    """A config with the cheapest settings that fit `vram` GiB, where it does not name others itself; ready: what it needs is installed.

    Raises:
        UserError: if nothing does, with the least that would; or the model's memory is not known beforehand.
    """
    config = configs.load(name, overrides, ready)
    if architectures.name_of(config.model) is None:
        names = ", ".join(name.partition("/")[2] for name in architectures.known())
        raise UserError(
            f"--vram: what {config.model!r} takes is not known beforehand; known are, and local copies: {names}"
        )
    if config.make_rule().needs.graph_bytes:
        raise UserError(
            "--vram: got a rule that fits itself into rule.memory_gib; allowed are fixed rule.depth and rule.span"
        )
    found = facts(config)
    least = float("inf")
    named = set(configs.given(config))
    asked = {override.partition("=")[0] for override in overrides}
    for chosen in _ways(config, found, vram, named, asked):
        tried = _with(config, chosen)
        taken = demand(tried, found)
        least = min(least, taken.total)
        if taken.total <= vram * GIB:
            kept = {**chosen, "memory.vram": vram, "memory.counted": round(taken.total / GIB, 1)}
            lines = [f"{key}={value}" for key, value in kept.items()]
            fit = configs.load(name, [*overrides, *lines], ready)
            differ = configs.differences(configs.settings(config), configs.settings(fit))
            return fit, Fitted({key: value for key, value in chosen.items() if key in differ}, taken, found)
    held = [key for rung in (*FREE, *DEAR) for key in rung if _fixed(config, named, key)]
    held += ["prompts.cache"] if config.prompts.cache is None and "prompts.cache" in named else []
    held += ["memory.encode_on"] if config.memory.encode_on == "device" and "memory.encode_on" in named else []
    ways = "a smaller lora.rank or picture, fewer rewards"
    ways += f", or without what is named: {', '.join(dict.fromkeys(held))}" if held else ""
    raise UserError(
        f"--vram: got {vram:g}, {config.model} at this size takes {math.ceil(10 * least / GIB) / 10:.1f} GiB at the least; allowed is "
        f"that or more, {ways}"
    )


def _ways(config: Config, found: Facts, vram: float, named: set[str], asked: set[str]) -> Iterator[dict[str, Any]]:
    """Settings to try, cheapest first: rung by rung the largest micro-batch, at last the smallest ones with everything on."""
    own, whole = config.micro_batch, config.divided
    sizes = [own * GROWS // 2**k for k in range(20) if own * GROWS // 2**k >= 1]
    sizes = [size for size in sizes if size <= whole and whole % size == 0] or [own]
    if "optimizer.micro_batch" in asked:  # on the command line: presets name one too
        sizes = [own]
    decided = config.prompts.cache is not None or "prompts.cache" in named
    chosen: dict[str, Any] = {} if decided else {"prompts.cache": CACHE}
    encoders = found.encoders * PRECISIONS[config.precision]
    leaves = config.prompts.cache is not None or "prompts.cache" in chosen
    if leaves and encoders + GIB > vram * GIB and not _fixed(config, named, "memory.encode_on"):
        chosen["memory.encode_on"] = "cpu"
    free: list[dict[str, Any]] = [chosen]
    dear: list[dict[str, Any]] = []
    for ladder, ways in ((FREE, free), (DEAR, dear)):
        for rung in ladder:
            allowed = {key: value for key, value in rung.items() if not _fixed(config, named, key)}
            chosen = chosen | {key: value for key, value in allowed.items() if not _less(config, key, value)}
            ways.append(chosen)
    # What costs next to nothing serves a larger micro-batch; what is dear does not.
    yield from (way | {"optimizer.micro_batch": size} for size in sizes if size >= own for way in free)
    yield from (way | {"optimizer.micro_batch": size} for way in dear for size in sizes if size >= own / SHRINKS)
    for size in sizes:
        yield chosen | {"optimizer.micro_batch": size}


def _fixed(config: Config, named: set[str], key: str) -> bool:
    """Whether the user has decided it."""
    if key == "memory.quantize" and config.memory.shard != "none":
        return True  # not both
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return key in named and value != "auto"


def _less(config: Config, key: str, value: Any) -> bool:
    """Whether the config does more already."""
    order = ("none", "spans", "blocks", "both")
    return key == "memory.checkpoint" and order.index(value) <= order.index(config.checkpoint)


def _with(config: Config, chosen: dict[str, Any]) -> Config:
    """The config with other values, unchecked: they are of the ladder."""
    sections: dict[str, dict[str, Any]] = {}
    changed: dict[str, Any] = {}
    for key, value in chosen.items():
        section, _, inner = key.partition(".")
        if inner:
            sections.setdefault(section, {})[inner] = value
        else:
            changed[key] = value
    changed |= {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    return config.model_copy(update=changed)


def verdict(vram: float, fit: Fitted) -> list[str]:
    """What `plan --vram` begins with."""
    told = ", ".join(f"{key}={value}" for key, value in fit.chosen.items()) or "as the config has it"
    taken = fit.demand
    return [
        f"fits        {vram:g} GiB: {taken.total / GIB:.1f}, counted, not measured, while {taken.largest} ({taken.parts})",
        f"with        {told}",
    ]
