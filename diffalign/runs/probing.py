"""Whether a reward that was written for another trainer means each sample by itself: asked before a run begins."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch

from diffalign.config import Config
from diffalign.protocols import Policy
from diffalign.rewards.scorer import Scorer
from diffalign.runs.parts import Parts
from diffalign.runtime.memory import fitting
from diffalign.types import Floats, Media, Plan, Prompts

SAME = 1e-3  # of a score, or absolutely below 1: what another order of additions may change


def probe(config: Config, parts: Parts, draw: Callable[[int], Prompts], say: Callable[[str], None]) -> None:
    """Score two different samples alone, together and swapped, and say where that makes a difference.

    Raises:
        Fault: if a reward fails, or returns what is no scores.
    """
    scorers = {**parts.judges.rewards, **parts.scorer.rewards}
    probed = {name: reward for name, reward in scorers.items() if reward.probed}
    if not (config.scoring.probe and probed):
        return
    given = fitting(parts.policy, functools.partial(two, parts.policy, draw), say)
    for name, reward in probed.items():
        for line in differences(Scorer({name: reward}), *given):
            say(f"{name}: {line}")


def two(policy: Policy, draw: Callable[[int], Prompts]) -> tuple[Media, Prompts]:
    """Two different samples, of two prompts if an update has so many; drawn in whole micro-batches, which is what may be compiled."""
    first = draw(0)
    row = next((k for k, text in enumerate(first.text) if text != first.text[0]), len(first) - 1)
    second, row = (first, row) if row else (draw(1), 0)
    shots: list[tuple[Media, Prompts, int]] = []
    for prompts, k in ((first, 0), (second, row)):
        start = k - k % policy.micro_batch
        if not (shots and second is first and start == 0):
            part = policy.rollout(
                prompts.select(range(start, min(start + policy.micro_batch, len(prompts)))),
                Plan.deterministic(policy.schedule.steps),
            )
            with torch.no_grad():
                media = policy.decode(part, part.x[-1])
        shots.append((media, prompts, k))
    pixels = torch.stack([media.pixels[k % policy.micro_batch] for media, _, k in shots])
    one, other = (prompts.select([k]) for _, prompts, k in shots)
    return Media(pixels, media.fps), Prompts(
        text=[*one.text, *other.text],
        group=np.concatenate([one.group, other.group]),
        seed=np.concatenate([one.seed, other.seed]),
        group_seed=np.concatenate([one.group_seed, other.group_seed]),
        metadata=[*one.metadata, *other.metadata],
    )


def differences(scorer: Scorer, media: Media, prompts: Prompts) -> list[str]:
    """What one reward's scores of two samples depend on besides the sample: the other one, or the place; nothing for a sound one."""

    def scores(rows: list[int]) -> Floats:
        given = scorer.scores(Media(media.pixels[rows], media.fps), prompts.select(rows))
        (values,) = given.by_name.values()
        return values

    together = scores([0, 1])
    alone = np.concatenate([scores([0]), scores([1])])
    swapped = scores([1, 0])[::-1]
    lines = []
    for others, where in ((alone, "alone"), (swapped, "in the other's place")):
        apart = np.abs(together - others)
        if (apart > SAME * np.maximum(1, np.abs(together))).any():
            worst = int(np.nanargmax(apart))
            lines.append(
                f"a sample's score depends on others: {together[worst]:.4g} beside one, {others[worst]:.4g} {where}, "
                f"{apart[worst]:.2g} apart; rules take scores to be the sample's own"
            )
    if not np.isfinite(together).all():
        lines.append(f"gave {together.tolist()} for two samples: a score is missing")
    return lines
