"""Truncated backpropagation of the reward: DRaFT-K (arXiv 2309.17400), AlignProp (arXiv 2310.03739), and all of it at K = T."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import BeforeValidator, Field

from diffalign.rules.settings import Settings
from diffalign.types import (
    Credit,
    Loss,
    Needs,
    Plan,
    Policy,
    Prompts,
    RewardFunction,
    Rollout,
    Schedule,
    Scores,
    Term,
    Tree,
)


def _depth(value: object) -> object:
    """One message for the whole union."""
    pair = isinstance(value, (list, tuple)) and len(value) == 2
    numbers = list(value) if pair else [value]  # type: ignore[call-overload]
    if value == "all" or all(type(number) is int and number >= 1 for number in numbers):
        return tuple(numbers) if pair else value
    raise ValueError("allowed are a whole number from 1, [low, high] of such, or all")


class TruncatedBP:
    """The reward's gradient through the decoder and the last K sampling steps; what came before is sampled without a graph."""

    name: ClassVar[str] = "truncated_bp"

    class Settings(Settings):
        """Keys of `rule:` for truncated_bp."""

        depth: Annotated[int | tuple[int, int] | Literal["all"], BeforeValidator(_depth)] = Field(
            1, description="K: steps with gradient; [low, high]: drawn anew for every update; all: exact"
        )
        objective: Literal["linear", "hinge"] = Field("linear", description="hinge: rewards above `target` do not pull")
        target: float | None = Field(None, description="of the hinge, in the reward's units", allow_inf_nan=False)
        noise: bool = Field(False, description="sample with the process's noise, as AlignProp does; false: as DRaFT")

        def problems(self, steps: int) -> list[str]:
            """What is wrong with these settings for a sampler of `steps` steps."""
            found = []
            low, high = self.range(steps)
            if not low <= high <= steps:
                given = low if low == high else [low, high]
                found.append(f"rule.depth: got {given}, allowed is 1 <= low <= high <= sampler.steps ({steps}), or all")
            if (self.objective == "hinge") != (self.target is not None):
                found.append(
                    f"rule.target: got {self.target} with objective {self.objective}; a hinge has a target, linear none"
                )
            return found

        def range(self, steps: int) -> tuple[int, int]:
            """Smallest and largest K."""
            if self.depth == "all":
                return steps, steps
            return (self.depth, self.depth) if isinstance(self.depth, int) else self.depth

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or self.Settings()

    @property
    def needs(self) -> Needs:
        return Needs(differentiable_reward=True, stochastic_sampler=self.settings.noise)

    def plan(self, schedule: Schedule, update: int, rng: np.random.Generator) -> Plan:
        """Sample without a graph to level T - K; the rest is the term's. The last step is never noisy."""
        steps = schedule.steps
        low, high = self.settings.range(steps)
        first = steps - int(rng.integers(low, high + 1))
        noise = (self.settings.noise,) * (steps - 1) + (False,)
        return Plan(first, noise, ((Term(first, steps, "reward"),),))

    def credit(self, tree: Tree, scores: Scores, prompts: Prompts) -> Credit | None:
        return None

    def loss(self, term: Term, policy: Policy, part: Rollout, credit: Credit | None, reward: RewardFunction) -> Loss:
        """-R(x_0), or max(0, target - R(x_0)), averaged over the part."""
        value = reward(policy.decode(part, policy.replay(part, term.start, term.stop).x))
        if self.settings.target is None:
            return Loss(-value.mean())
        below = (self.settings.target - value).clamp(min=0)
        return Loss(below.mean(), {"below_target": (below > 0).double().mean().detach()})
