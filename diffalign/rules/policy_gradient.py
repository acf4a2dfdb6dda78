"""Clipped policy gradients on stored transitions: Flow-GRPO (arXiv 2505.05470)."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from diffalign import ops
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


class FlowGRPO:
    """Group-relative advantages, the clipped surrogate on every noisy step, and a velocity-space KL to the base model."""

    name: ClassVar[str] = "flow_grpo"

    class Settings(Settings):
        """Keys of `rule:` for flow_grpo."""

        clip: float = Field(1e-4, gt=0, description="half-width of the ratio's range; ratios average over latent dims")
        kl: float = Field(0.0, ge=0, description="weight of mean (v - v_reference)^2")
        scale: Literal["group", "batch", "none"] = Field("group", description="what advantages are divided by")
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

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or self.Settings()

    @property
    def needs(self) -> Needs:
        return Needs(stochastic_sampler=True, reference=self.settings.kl > 0)

    def plan(self, schedule: Schedule, update: int, rng: np.random.Generator) -> Plan:
        """Sample to the end with noise in the window; one log-prob term per noisy step. The last step is never noisy."""
        first, stop = self.settings.window or (0, schedule.steps)
        noisy = [
            k for k in range(schedule.steps) if first <= k < stop and k < schedule.steps - 1 and schedule.std[k] > 0
        ]
        weights = np.ones(len(noisy))
        if self.settings.step_weight == "equal":
            # At ratio 1 the gradient on the prediction is A gain / (std D) eps: multiply by std / gain.
            weights = schedule.std[noisy] / schedule.gain[noisy]
            weights = weights / weights.mean()
        terms = tuple(
            Term(k, k + 1, "log_prob", weight=float(w) / len(noisy)) for k, w in zip(noisy, weights, strict=True)
        )
        return Plan(
            stop=schedule.steps,
            noise=tuple(k in noisy for k in range(schedule.steps)),
            updates=(terms,) * self.settings.inner_updates,
            shared_start=self.settings.shared_start,
        )

    def credit(self, tree: Tree, scores: Scores, prompts: Prompts) -> Credit:
        """The leaf's group-relative advantage, the same on every edge that leads to it."""
        group = prompts.group[tree.leaf_root]
        s = self.settings
        advantage = ops.advantages.group_relative(
            scores.total, group, scores.valid, scale=s.scale, limit=s.advantage_limit
        )
        return ops.advantages.average_to_parents(advantage, tree.parent)[1:]

    def loss(self, term: Term, policy: Policy, part: Rollout, credit: Credit | None, reward: RewardFunction) -> Loss:
        """max(-A r, -A clip(r)) + kl * mean (v - v_ref)^2 at the term's step, averaged over the part."""
        assert credit is not None
        step, s = term.start, self.settings
        now = policy.transition(part, step)
        old = part.log_prob[step]
        assert old is not None, f"step {step} is deterministic"
        parent = part.tree.parent[step]
        new = ops.gaussian.log_prob(part.x[step + 1], now.mean[parent], now.std, reduce="mean")
        log_ratio = new - old
        advantage = new.new_tensor(credit[step])
        value = ops.surrogate.clipped(log_ratio, advantage, s.clip).mean()
        low, high = ops.surrogate.clip_fraction(log_ratio.detach(), s.clip)
        metrics = {
            "ratio": log_ratio.detach().exp().mean(),
            "clip_low": low,
            "clip_high": high,
            "advantage": advantage.abs().mean(),
        }
        if s.kl > 0:
            with policy.reference():
                base = policy.transition(part, step).prediction
            # The subtraction stays outside the reference context: its gradient is the point.
            kl = ((now.prediction - base) ** 2).mean()
            # The step weight belongs to the surrogate alone: undone here, every step weighs 1 / steps.
            value = value + s.kl * kl / (term.weight * sum(part.plan.noise))
            metrics["kl"] = kl.detach()
        return Loss(value, metrics, gap=log_ratio.detach().abs().max())
