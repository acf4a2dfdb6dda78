"""Keys that belong to the model: where a config does not name them, or says `auto`, the model decides them when the config is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from diffalign.config.dotted import put
from diffalign.models import families
from diffalign.models.families import Usual
from diffalign.shapes import models

AUTO = "auto"
NOISE = {"ddim": 1.0}  # of a process, where it is not the usual 0.7

# key -> what it becomes, from what is usual for the model and the sampler's settings as far as they are there
KEYS: dict[str, Callable[[Usual, dict[str, Any]], Any]] = {
    "sampler.process": lambda model, sampler: model.process,
    "sampler.noise_level": lambda model, sampler: _noise(model, sampler.get("process", "")),
    "sampler.steps": lambda model, sampler: model.steps,
    "sampler.guidance_scale": lambda model, sampler: model.guidance_scale,
    "sampler.pipeline_args": lambda model, sampler: model.pipeline_args,
    "precision": lambda model, sampler: model.precision,
}


def _noise(model: Usual, process: str) -> float:
    own = model.noise_level if process == model.process else None
    return NOISE.get(process, 0.7) if own is None else own


# Keys that a config need not name, in the schema's words.
OPEN = (*KEYS, "memory.checkpoint")


@dataclass(frozen=True)
class Decided:
    """What a model decided of a config, by dotted key; source: what says so, in words."""

    values: dict[str, Any] = field(default_factory=dict)
    source: str = ""

    def besides(self, keys: Iterable[str]) -> Decided:
        """Without some keys, which are decided otherwise now."""
        return replace(self, values={key: value for key, value in self.values.items() if key not in keys})

    def told(self, model: str) -> list[str]:
        """What a user is told of it."""
        shown = {key: value for key, value in self.values.items() if key in KEYS}
        if not shown or (models.path(model) and shown.keys() == {"precision"}):
            return []
        words = ", ".join(f"{key.rpartition('.')[2]} {_word(value)}" for key, value in shown.items())
        return [f"auto, by {self.source}: {words}"]


def decide(raw: dict[str, Any]) -> Decided:
    """Write into raw settings what the model decides; returns that.

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
        return Decided(decided)
    found = families.usual(raw["model"], raw.get("revision"))
    for key in wanted:
        decided[key] = KEYS[key](found, raw.get("sampler", {}))
        put(raw, key, decided[key])
    return Decided(decided, found.source)


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


def _word(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {v}" for k, v in value.items()) + "}"
    return "of the pipeline" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
