"""Adapters that a config names: there, whole, and of the same model."""

from __future__ import annotations

from pathlib import Path

from diffalign.config.schema import Config
from diffalign.errors import UserError, shown
from diffalign.models.hub_files import HubPlace
from diffalign.models.notes import LORA, Notes, choices
from diffalign.models.places import PLACES, named, place_of
from diffalign.rules.distil import OTHERS, TAG
from diffalign.runtime.files import is_folder


def start(config: Config) -> list[str]:
    """An adapter to go on from that is there, whole, and of the same model."""
    if config.lora.start is None:
        return []
    folder = place_of(config.lora.start)
    if folder is None and HubPlace.of(config.lora.start) is None:
        run, at, _ = config.lora.start.rpartition("@")
        there = f"; of that run: {choices(Path(run))}" if at and is_folder(Path(run)) else ""
        return [f"lora.start: got {shown(config.lora.start)}, no {LORA} there; allowed is {PLACES}{there}"]
    return of_the_model("lora.start", folder, config.model)


def of_the_model(key: str, place: Path | None, model: str) -> list[str]:
    """Whether an adapter belongs to a model, as far as it says that; None, on the hub: what is in it is found out with the model."""
    if place is None or not place.is_dir():
        return []
    try:
        base = Notes.read(place).base_model
    except ValueError as error:
        return [f"{key}: {error}"]
    return [] if base in ("", model) else [f"{key}: {place} belongs to {base}, the run's model is {model}"]


def teachers(config: Config) -> list[str]:
    """A teacher for every prompt, where the rule has some. Whether they are there is found out when the run begins: they are often runs
    that are yet to be."""
    given = config.rule.get("teachers")
    if not isinstance(given, dict) or not given:
        return []
    problems: list[str] = []
    tags = {str(entry.get(TAG)) for entry in config.book.training}
    if OTHERS not in given and (lacking := sorted(tags - given.keys())):
        problems.append(
            f"rule.teachers: nobody teaches prompts with tag {', '.join(lacking)}; allowed is one for {OTHERS!r}"
        )
    if idle := [tag for tag in given if tag != OTHERS and tag not in tags]:
        problems.append(
            f"rule.teachers: got {shown(idle[0])}, no prompt has that tag; there are {', '.join(sorted(tags))}"
        )
    if config.memory.shard != "none":
        problems.append(f"memory.shard: got {config.memory.shard}, rule.teachers are held whole; allowed is none")
    if config.rule.get("teacher_guidance") is not None and config.prompts.cache is not None:
        # a call with another guidance may ask for other encodings
        problems.append(
            "rule.teacher_guidance: got one with prompts.cache, which keeps the texts of the student's call alone; "
            "allowed is one of the two"
        )
    return problems


def frozen(config: Config) -> list[str]:
    """Adapters that are there and of the same model, on a base that they can become part of."""
    problems: list[str] = []
    for text in config.lora.frozen:
        try:
            problems += of_the_model("lora.frozen", place_of(named(text, "lora.frozen")[0]), config.model)
        except UserError as error:
            problems += error.problems
    if len(set(config.lora.frozen)) < len(config.lora.frozen):
        problems.append(
            f"lora.frozen: got {shown(config.lora.frozen)}, one adapter twice; allowed is once, with another strength"
        )
    if config.lora.frozen and config.memory.quantize != "none":
        problems.append(
            f"lora.frozen: what it adds to a base in {config.memory.quantize} would be rounded away; allowed is memory.quantize=none"
        )
    if config.rule.get("reference") == "start" and config.lora.start is None:
        problems.append("rule.reference: got start without lora.start; allowed are auto and base")
    return problems
