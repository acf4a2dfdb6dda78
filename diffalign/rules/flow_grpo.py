"""Flow-GRPO (arXiv 2505.05470)."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from diffalign import ops
from diffalign.rules import policy_gradient
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

    class Settings(policy_gradient.PolicyGradientSettings):
        """Keys of `rule:` for flow_grpo."""

        clip: float = Field(1e-4, gt=0, description=policy_gradient.CLIP)
        kl: float = Field(0.0, ge=0, description="weight of mean (v - v_reference)^2")
        scale: Literal["group", "batch", "none"] = Field("group", description="what advantages are divided by")

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or self.Settings()

    @property
    def needs(self) -> Needs:
        return Needs(stochastic_sampler=True, groups=True, reference=self.settings.kl > 0)

    def plan(self, schedule: Schedule, update: int, rng: np.random.Generator) -> Plan:
        return policy_gradient.plan(schedule, self.settings)

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
        s = self.settings
        step = policy_gradient.evaluate(term.start, policy, part, credit)
        value, metrics = policy_gradient.clipped(step, s.clip)
        if s.kl > 0:
            with policy.reference():
                base = policy.transition(part, term.start).prediction
            # The subtraction stays outside the reference context: its gradient is the point.
            kl = ((step.now.prediction - base) ** 2).mean()
            # The step weight belongs to the surrogate alone: undone here, every step weighs 1 / steps.
            value = value + s.kl * kl / (term.weight * sum(part.plan.noise))
            metrics["kl"] = kl.detach()
        return Loss(value, metrics, gap=step.gap)
