"""The loss that the network was made with, on samples that are given: not a rule of its own, but what others are anchored by."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from diffalign import ops
from diffalign.protocols import BASE, Loss, Policy, RewardFunction
from diffalign.rules._data import DataSettings
from diffalign.rules._forward import drawn_levels, noised
from diffalign.rules._rule import Rule, RuleSettings
from diffalign.runtime import keys
from diffalign.types import Credit, Plan, Rollout, Schedule, Term


class Matching(Rule):
    """weight mean |v - v*|^2 of finished samples noised anew; what the bare base model's is of the same noise is noted beside."""

    name: ClassVar[str] = "matching"

    def __init__(self, data: DataSettings) -> None:
        super().__init__(RuleSettings())
        self.data = data

    def plan(self, schedule: Schedule, update: int, rng: np.random.Generator) -> Plan:
        """Terms at drawn levels; without pure noise, where epsilon says nothing about x_0."""
        levels = drawn_levels(np.arange(1, schedule.steps), self.data.times, False, rng)
        terms = tuple(
            Term(level, level, "forward", self.data.weight * share, draw=int(rng.integers(1, 2**62)))
            for level, share in levels
        )
        return Plan(schedule.steps, (False,) * schedule.steps, (terms,))

    def loss(self, term: Term, policy: Policy, part: Rollout, credit: Credit | None, reward: RewardFunction) -> Loss:
        """mean |v - v*|^2 over the part's rows."""
        at = noised(term, policy, part)
        own = ops.matching.error(at.predicted(policy), at.target).mean()
        with policy.weights(BASE):
            base = ops.matching.error(at.predicted(policy), at.target).mean()
        return Loss(own, {keys.DATA: own.detach(), keys.DATA_BASE: base})
