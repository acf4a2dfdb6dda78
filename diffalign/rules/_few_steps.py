"""Whether a network is a flow, which says the mean of what could be, or was distilled to few steps and says one picture of it.

Noise drawn anew pulls a distilled network to that mean, at every strength of the reward: it blurs. With f the clean samples that it
predicts and x_0 its own samples, the mean gradient of a matching rule at x_t has the part 2 E[A | x_t] (f - E[x_0 | x_t]), which is 0 for
a flow alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diffalign import ops
from diffalign.protocols import Policy
from diffalign.rules._forward import renoised
from diffalign.runtime.randomness import Purpose
from diffalign.types import Integers, Plan, Prompts, Schedule, chunks

GAP = 0.15  # D below which a network is distilled; benchmarks/results/few_steps.json has what was measured
SIGNAL = 0.1  # least alpha of a level for epsilon prediction: at less, its error is the clean sample's many times over
LEVELS = 2  # noisiest ones that are asked
DRAW = 0  # of the noise; those of updates are 1 and more


@dataclass(frozen=True)
class OwnWalk:
    """A network against its own walk at some levels, noisiest first: D and q of `ops.matching.against_own_walk` at each, over so many
    samples."""

    levels: tuple[int, ...]
    gaps: tuple[float, ...]
    shares: tuple[float, ...]
    samples: int

    @property
    def distilled(self) -> bool:
        """Whether the network predicts where its own steps lead, at the noisiest level: with few steps the others have few left."""
        return self.gaps[0] < GAP

    def __str__(self) -> str:
        gaps, shares = (" and ".join(f"{value:.2f}" for value in values) for values in (self.gaps, self.shares))
        return f"D {gaps}, q {shares}, {self.samples} samples"


def asked_levels(schedule: Schedule) -> Integers:
    """The noisiest levels at which a prediction says something of the sample, the last step's left out: over that one f_s is f."""
    levels = np.arange(schedule.steps - 1)
    return levels[(schedule.alpha[levels] >= SIGNAL) | (schedule.prediction != "epsilon")][:LEVELS]


def own_walk(policy: Policy, prompts: Prompts) -> OwnWalk | None:
    """D and q on samples of the policy's own, drawn without noise, with one noise each; None if no level can be asked.

    Without a graph; costs the walk of as many samples and, a level, their walk from there and one more call of the network.
    """
    import torch

    schedule, steps = policy.schedule, policy.schedule.steps
    levels = asked_levels(schedule)
    found = []
    with torch.no_grad():
        part = policy.rollout(prompts, Plan.deterministic(steps))
        for level in map(int, levels):
            clean, walked = [], []
            for rows in chunks(len(prompts), policy.micro_batch):
                there, _ = renoised(part.select(rows), schedule, level, Purpose.FORWARD, DRAW)
                clean.append(policy.replay(there, level, level + 1).clean)
                walked.append(policy.replay(there, level, steps).x)
            found.append(ops.matching.against_own_walk(torch.cat(clean), torch.cat(walked), part.x[-1]))
    if not found or not np.isfinite(found).all():
        return None
    gaps, shares = zip(*found, strict=True)
    return OwnWalk(tuple(map(int, levels)), gaps, shares, len(prompts))
