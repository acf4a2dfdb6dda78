"""DiffusionNFT (arXiv 2509.16117): positive and negative finetuning on the forward process, with the policy that samples."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from diffalign import ops
from diffalign.protocols import Loss, Needs, Policy, RewardFunction
from diffalign.rules import _forward as forward
from diffalign.runtime.settings import factors
from diffalign.types import Credit, Plan, Rollout, Schedule, Term, Update

EQUAL = 5  # updates after which it is said that the old policy is the trained one


class NFT(forward.ForwardRule):
    """Matching errors of v+ = b v + (1 - b) v_old and v- = (1 + b) v_old - b v, weighed by r and 1 - r in [0, 1].

    An old policy samples; it follows the trained one slowly. Where both are equal the loss does not depend on the reward, its
    gradient does.
    """

    name: ClassVar[str] = "nft"

    class Settings(forward.ForwardSettings):
        """Keys of `rule:` for nft."""

        beta: float = Field(
            1.0,
            gt=0,
            description="b: how far v+ and v- lie from the old policy; small: faster, less stable",
            json_schema_extra=factors(0.1, 10),
        )
        centre: Literal["old", "reference"] = Field(
            "old", description="what v+ and v- lie on either side of; reference: v - v_reference beside v_old (RAM)"
        )
        space: Literal["clean", "prediction"] = Field(
            "clean",
            description="clean: errors of the implied x_0, each divided by its own size; prediction: of the velocity",
        )
        old_decay: float = Field(0.5, ge=0, le=1, description="of the old policy per update, reached in steps of 0.001")
        kl: float = Field(
            1e-4, ge=0, description="weight of mean (v - v_reference)^2", json_schema_extra=factors(0.1, 10)
        )

        @property
        def referred(self) -> bool:
            """Whether anything is held against the reference."""
            return super().referred or self.centre == "reference"

    settings: Settings

    @property
    def needs(self) -> Needs:
        s = self.settings
        # At A = 0 the loss still draws v towards v_old.
        return Needs(groups=True, reference=s.referred, stochastic_sampler=s.noise, anchored=True, exact_steps=False)

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self._equal = 0  # updates in a row in which the old policy was the trained one

    def remark(self, update: Update) -> str:
        # With equal policies nothing is learnt from their difference; in the first update they are equal anyway.
        self._equal = self._equal + 1 if update.metrics.get("old_deviation", 1.0) == 0 else 0
        if self._equal != EQUAL:
            return ""
        return f"the old policy has equalled the trained one for {EQUAL} updates; rule.old_decay: {self.settings.old_decay:g} is too low"

    def decays(self, update: int) -> dict[str, float]:
        return {"old": forward.rising(update, self.settings.old_decay)}

    def plan(self, schedule: Schedule, update: int, rng: np.random.Generator) -> Plan:
        return forward.plan(schedule, self.settings, rng, sampled_by="old")

    def loss(self, term: Term, policy: Policy, part: Rollout, credit: Credit | None, reward: RewardFunction) -> Loss:
        """(limit / b) mean(r L+ + (1 - r) L-) + kl mean (v - v_reference)^2, with r = (1 + A / limit) / 2."""
        assert credit is not None
        s = self.settings
        at = forward.noised(term, policy, part, s.shared_noise)
        predicted = at.predicted(policy)
        with policy.shadow("old"):
            old = at.predicted(policy)
        base = None
        above, below = (1 - s.beta) * old, (1 + s.beta) * old  # of v+ and v-, what is not v's
        if s.centre == "reference":
            with policy.reference():
                base = at.predicted(policy)
            above, below = old - s.beta * base, old + s.beta * base
        positive = self._error(at, s.beta * predicted + above)
        r = (1 + ops.gaussian.like(credit.edges[-1], positive)) / 2  # credit is A / limit
        negative = self._error(at, below - s.beta * predicted)
        value = s.advantage_limit / s.beta * (r * positive + (1 - r) * negative).mean()
        metrics = {"old_deviation": ops.matching.error(predicted, old).mean().detach()}
        value = self.held(value, metrics, at, predicted, policy, credit, base)
        return Loss(value, metrics)

    def _error(self, at: forward.Noised, predicted: Any) -> Any:
        if self.settings.space == "prediction":
            return ops.matching.error(predicted, at.target)
        return at.clean_error(predicted)
