"""The adapters of a run: what it trains, starts from, is on top of, and has beside it."""

from __future__ import annotations

from typing import Any

import torch

from diffalign.config import Config
from diffalign.config.adapters import of_the_model
from diffalign.errors import UserError
from diffalign.models import calls, lora, lora_files, merging
from diffalign.models.places import Adapter, found, given
from diffalign.models.products import FROZEN
from diffalign.runtime.files import home


def named(config: Config) -> tuple[Adapter | None, tuple[Adapter, ...], dict[str, Adapter]]:
    """What the run starts from, what is frozen, and what stands by for its rule; fetched if it is on the hub, and then looked at as the
    config's check looks at what is here."""
    start = None if config.lora.start is None else found(config.lora.start, 1.0, "lora.start")
    frozen = tuple(given(text, "lora.frozen") for text in config.lora.frozen)
    beside = _beside(config)
    fetched = [("lora.start", start), *(("lora.frozen", each) for each in frozen)]
    looked_at = [(key, each) for key, each in fetched if each and each.commit]
    for key, adapter in [*looked_at, *((_tagged(config, name), each) for name, each in beside.items())]:
        if problems := of_the_model(key, adapter.folder, config.model):
            raise UserError(*problems)
    return start, frozen, beside


def _beside(config: Config) -> dict[str, Adapter]:
    """What stands by for the rule, by its names there.

    Raises:
        UserError: for all that are not there.
    """
    beside: dict[str, Adapter] = {}
    problems: list[str] = []
    for name in config.make_rule().needs.adapters:
        try:
            beside[name] = found(home(name), 1.0, _tagged(config, name))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return beside


def _tagged(config: Config, name: str) -> str:
    """The key that names a teacher, with its tag."""
    tags = (tag for tag, teacher in config.rule.get("teachers", {}).items() if teacher == name)
    return ".".join(["rule.teachers", *list(tags)[:1]])


def freeze(config: Config, pipe: Any, frozen: tuple[Adapter, ...]) -> None:
    """Let frozen adapters become part of the base: its bits are then the reference's, and cost nothing."""
    try:
        changed = merging.merge(pipe, frozen)
        if config.prompts.cache is not None and (texts := set(changed) - lora.denoisers(pipe).keys()):
            raise ValueError(
                f"it has layers of the {min(texts)}, prompts.cache has texts encoded without; allowed is prompts.cache=null"
            )
    except ValueError as error:
        raise UserError(f"lora.frozen: {error}") from error


def attach(config: Config, pipe: Any, start: Adapter | None) -> dict[str, torch.Tensor]:
    """Attach what is trained, with the effect of the adapter it starts from."""
    settings = config.lora
    parameters = lora.attach(pipe, settings.rank, settings.alpha, settings.targets, config.seed)
    if start is not None:
        try:
            lora_files.go_on_from(pipe, start.folder)
        except ValueError as error:
            raise UserError(f"lora.start: {start} does not fit: {error}") from error
    return parameters


def stand_by(config: Config, pipe: Any, beside: dict[str, Adapter]) -> dict[str, str]:
    """Load what stands by for the rule; peft's names of it by the rule's.

    Raises:
        UserError: if one does not fit, or the pipeline takes no guidance.
    """
    guidance = config.rule.get("teacher_guidance")
    if guidance is not None and (lines := calls.unknown(pipe, {"guidance_scale": guidance})):
        raise UserError(*(f"rule.teacher_guidance: {line}" for line in lines))
    names: dict[str, str] = {}
    for name, adapter in beside.items():
        names[name] = f"{FROZEN}{len(names)}"
        try:
            lora_files.stand_by(pipe, adapter.folder, names[name])
        except ValueError as error:
            raise UserError(f"rule.teachers: {adapter} does not fit: {error}") from error
    return names
