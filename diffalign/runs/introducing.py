"""What a user is told of what a run has loaded."""

from __future__ import annotations

from collections.abc import Callable

import torch

from diffalign.config import Config
from diffalign.models.notes import Notes
from diffalign.rewards import families
from diffalign.rewards.catalog import find
from diffalign.rewards.narrow import Narrow, difference
from diffalign.runs import distilled
from diffalign.runs.devices import promise
from diffalign.runs.parts import Parts
from diffalign.types import Plan, Prompts


def introduce(config: Config, parts: Parts, batch: Prompts, say: Callable[[str], None]) -> None:
    """Say what a user should know of what was loaded; `batch`: samples to try it on."""
    place = parts.place
    for line in [*config.told, *parts.policy.remarks, *promise(config)]:
        say(line)
    parts.policy.notify = say
    if config.evaluation.enabled and config.book.shared:
        say("evaluating on prompts that are trained on: scores do not say what is true of others")
    if config.evaluation.enabled and len(config.book.evaluation) < config.book.held_out:
        say(f"evaluating {config.book.extent} as evaluation.prompts says; null: all")
    if config.scoring.frames == "first_latent" and (
        moving := [n for n in config.rewards if find(n).modality == "video"]
    ):
        say(
            f"scoring.frames: first_latent: {', '.join(moving)} see one frame of each video: nothing they say of what moves is learnt from"
        )
    held_out = [name for name in config.eval_rewards if name not in config.rewards]
    if said := families.warning(held_out, config.rewards, "hold one of another family out too, eval_rewards"):
        say(said)
    if place.commit is not None:
        say(f"{config.model} at commit {place.commit}")
    if place.file:
        say(f"from {config.weights}: {place.file}")
    _introduce_adapters(config, parts, say)
    distilled.introduce(config, parts.policy, say)
    if narrow := [name for name, reward in parts.scorer.rewards.items() if isinstance(reward, Narrow)]:
        part = parts.policy.rollout(batch, Plan.deterministic(parts.policy.schedule.steps))
        with torch.no_grad():
            media = parts.policy.decode(part, part.x[-1])
        for name in narrow:
            apart, spread = difference(parts.scorer.rewards[name], parts.judges.rewards[name], media, part.at(-1))
            say(
                f"{name} in bfloat16: scores of {len(batch)} pictures differ by up to {apart:.2g}; their std is {spread:.2g}"
            )


def _introduce_adapters(config: Config, parts: Parts, say: Callable[[str], None]) -> None:
    """Say what a user should know of what the run begins with and on."""
    frozen = [("lora.frozen", each) for each in parts.frozen]
    beside = [("rule.teachers", each) for each in parts.beside.values()]
    for key, adapter in (("lora.start", parts.start), *frozen, *beside):
        if adapter is not None and adapter.commit:
            say(f"{key}: {adapter} on the hub")
    began = parts.start.folder if parts.start is not None and parts.start.folder.is_dir() else None
    if began is not None and (was := Notes.read(began).quantize) not in ("", config.memory.quantize):
        say(
            f"lora.start was trained with memory.quantize {was}, this base has {config.memory.quantize}: it acts as the two differ"
        )
    if config.lora.frozen:
        say(f"on top of {', '.join(config.lora.frozen)}, part of the base in this run")
    if began is not None:
        lacking = [spec for spec in Notes.read(began).frozen if spec["digest"] not in {a.digest for a in parts.frozen}]
        for spec in lacking:
            say(
                f"lora.start was trained on top of {spec['place']}:{spec['strength']:g}, which is not in lora.frozen here"
            )
