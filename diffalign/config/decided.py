"""Keys that belong to the model: where a config does not name them, or says `auto`, the model decides them when the config is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffalign.config.schema import Config
from diffalign.models import families
from diffalign.models.families import Usual
from diffalign.shapes import models

AUTO = "auto"
NOISE = {"ddim": 1.0}  # of a process, where it is not the usual 0.7

# key -> what it becomes, from what is usual for the model and the sampler's settings as far as they are there
KEYS: dict[str, Callable[[Usual, dict[str, Any]], Any]] = {
    "sampler.process": lambda model, sampler: model.process,
    "sampler.noise_level": lambda model, sampler: NOISE.get(sampler.get("process", ""), 0.7),
    "sampler.steps": lambda model, sampler: model.steps,
    "sampler.guidance_scale": lambda model, sampler: model.guidance_scale,
    "sampler.pipeline_args": lambda model, sampler: model.pipeline_args,
    "precision": lambda model, sampler: model.precision,
}


def decide(raw: dict[str, Any]) -> dict[str, Any]:
    """Write into raw settings what the model decides; returns that by dotted key.

    Raises:
        UserError: if something is to be decided and nothing is known of the model.
    """
    decided: dict[str, Any] = {}
    memory = {} if raw.get("memory") is None else raw["memory"]
    # Graphs of embedded pipelines fit anywhere.
    if not models.path(raw["model"]) and isinstance(memory, dict) and "checkpoint" not in memory:
        decided["memory.checkpoint"], raw["memory"] = AUTO, {**memory, "checkpoint": AUTO}
    wanted = [key for key in KEYS if _open(raw, key)]
    if not wanted:
        return decided
    found = families.usual(raw["model"], raw.get("revision"))
    for key in wanted:
        section, _, name = key.rpartition(".")
        place = raw.setdefault(section, {}) if section else raw
        decided[key] = place[name] = KEYS[key](found, raw.get("sampler", {}))
    return decided


def undecided(raw: dict[str, Any]) -> None:
    """Leave out what nobody can decide."""
    for key in KEYS:
        section, _, name = key.rpartition(".")
        place = raw.get(section) if section else raw
        if isinstance(place, dict) and place.get(name) == AUTO:
            del place[name]


def _open(raw: dict[str, Any], key: str) -> bool:
    section, _, name = key.rpartition(".")
    place = raw.get(section, {}) if section else raw
    return isinstance(place, dict) and place.get(name, AUTO) == AUTO


def told(config: Config) -> list[str]:
    """What a user is told of it."""
    shown = {key: value for key, value in config.decided.items() if key in KEYS}
    if not shown or (models.path(config.model) and shown.keys() == {"precision"}):
        return []
    words = ", ".join(f"{key.rpartition('.')[2]} {_word(value)}" for key, value in shown.items())
    return [f"auto, by {families.usual(config.model, config.revision).source}: {words}"]


def _word(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {v}" for k, v in value.items()) + "}"
    return "of the pipeline" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
