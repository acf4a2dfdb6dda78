"""What policy-gradient rules on stored transitions share: which steps are noisy, their weights, the ratio at one step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from diffalign import ops
from diffalign.rules.settings import Settings
from diffalign.types import Credit, Plan, Policy, Rollout, Schedule, Term, Transition

if TYPE_CHECKING:
    from torch import Tensor

CLIP = "half-width of the ratio's range; ratios average over latent dims"


class PolicyGradientSettings(Settings):
    """Keys that every policy-gradient rule has."""

    advantage_limit: float = Field(5.0, gt=0, description="advantages are clipped to +- this")
    window: tuple[int, int] | None = Field(None, description="first and one past the last noisy step; null: all")
    step_weight: Literal["none", "equal"] = Field(
        "none", description="equal: undo each step's std / gain, so that no step dominates the gradient"
    )
    inner_updates: int = Field(1, ge=1, description="optimiser steps per rollout")
    shared_start: bool = Field(False, description="one initial noise per group")

    def problems(self, steps: int) -> list[str]:
        """What is wrong with these settings for a sampler of `steps` steps."""
        first, stop = self.window or (0, steps)
        if 0 <= first < stop <= steps and first < steps - 1:
            return []
        given, rule = [first, stop], "0 <= first < stop <= sampler.steps"
        return [
            f"rule.window: got {given}, allowed is {rule} ({steps}), first before the last step, which has no noise"
        ]


def plan(schedule: Schedule, settings: PolicyGradientSettings) -> Plan:
    """Sample to the end with noise in the window; one log-prob term per noisy step, weights averaging to 1 / steps.

    The last step is never noisy: its noise would stay in the picture.
    """
    first, stop = settings.window or (0, schedule.steps)
    noisy = [k for k in range(schedule.steps - 1) if first <= k < stop and schedule.std[k] > 0]
    weights = np.ones(len(noisy))
    if settings.step_weight == "equal":
        # At ratio 1 the gradient on the prediction is A gain / (std D) eps: multiply by std / gain.
        weights = schedule.std[noisy] / schedule.gain[noisy]
        weights = weights / weights.mean()
    terms = tuple(Term(k, k + 1, "log_prob", weight=float(w) / len(noisy)) for k, w in zip(noisy, weights, strict=True))
    return Plan(
        stop=schedule.steps,
        noise=tuple(k in noisy for k in range(schedule.steps)),
        updates=(terms,) * settings.inner_updates,
        shared_start=settings.shared_start,
    )


@dataclass(frozen=True)
class Step:
    """A stored step under the present parameters: log_prob and log_ratio to the rollout's, advantage, all (N_{t+1},)."""

    now: Transition
    log_prob: Tensor
    log_ratio: Tensor
    advantage: Tensor

    @property
    def gap(self) -> Tensor:
        """Largest |log-ratio|: 0 before the parameters have moved."""
        return self.log_ratio.detach().abs().max()

    @property
    def metrics(self) -> dict[str, Tensor]:
        return {"ratio": self.log_ratio.detach().exp().mean(), "advantage": self.advantage.abs().mean()}


def evaluate(step: int, policy: Policy, part: Rollout, credit: Credit | None) -> Step:
    """Run the network at a stored step and compare with the rollout."""
    assert credit is not None
    now, old = policy.transition(part, step), part.log_prob[step]
    assert old is not None, f"step {step} is deterministic"
    new = ops.gaussian.log_prob(part.x[step + 1], now.mean[part.tree.parent[step]], now.std, reduce="mean")
    return Step(now, new, new - old, new.new_tensor(credit[step]))


def clipped(step: Step, clip: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean of max(-A r, -A clip(r)) over the part, and how much was clipped."""
    low, high = ops.surrogate.clip_fraction(step.log_ratio.detach(), clip)
    value = ops.surrogate.clipped(step.log_ratio, step.advantage, clip).mean()
    return value, {**step.metrics, "clip_low": low, "clip_high": high}
