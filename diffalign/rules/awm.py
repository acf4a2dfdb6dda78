"""AWM, advantage-weighted matching (arXiv 2509.25050): the pretraining loss on a policy's own samples, weighted by advantages."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from diffalign import ops
from diffalign.protocols import Loss, Needs, Policy, RewardFunction
from diffalign.rules import _forward as forward
from diffalign.types import Credit, Plan, Rollout, Schedule, Term


class AWM(forward.ForwardRule):
    """A clipped surrogate on log p = -w(|v - v*|^2, t), held near a slow copy of itself.

    With a negative advantage the loss has no lower bound: a growth function that flattens (ghuber) and the anchor are part of
    the rule, not an option to do without.
    """

    name: ClassVar[str] = "awm"

    class Settings(forward.ForwardSettings):
        """Keys of `rule:` for awm."""

        weight: Literal["uniform", "t", "t2", "huber", "ghuber"] = Field(
            "ghuber", description="w, of the squared error and t"
        )
        power: float = Field(0.25, gt=0, le=1, description="p of ghuber")
        clip: float = Field(1.0, gt=0, description="half-width of the ratio's range")
        anchor: float = Field(1.0, ge=0, description="weight of mean (v - v_anchor)^2, to a slow copy")
        anchor_decay: float = Field(
            0.3, ge=0, le=1, description="of the copy per update, reached from 0 in steps of 0.001"
        )

    settings: Settings

    @property
    def needs(self) -> Needs:
        s = self.settings
        return Needs(groups=True, reference=s.kl > 0, stochastic_sampler=s.noise, anchored=s.kl > 0 or s.anchor > 0)

    def decays(self, update: int) -> dict[str, float]:
        s = self.settings
        anchor = {"anchor": forward.rising(update, s.anchor_decay)} if s.anchor > 0 else {}
        return {**anchor, "old": 0.0} if s.inner_updates > 1 else anchor  # old: the policy that samples

    def plan(self, schedule: Schedule, update: int, rng: np.random.Generator) -> Plan:
        return forward.plan(schedule, self.settings, rng)

    def loss(self, term: Term, policy: Policy, part: Rollout, credit: Credit | None, reward: RewardFunction) -> Loss:
        """max(-A r, -A clip(r)) with log r = w(ell_old) - w(ell), + anchor and kl terms, averaged over the part."""
        assert credit is not None
        s, at = self.settings, forward.noised(term, policy, part)
        predicted = at.predicted(policy)
        log_p = self._log_p(at, predicted)
        old = log_p.detach()
        if s.inner_updates > 1:
            with policy.shadow("old"):
                old = self._log_p(at, at.predicted(policy))
        advantage = ops.gaussian.like(credit[-1], log_p)
        value = ops.surrogate.clipped(log_p - old, advantage, s.clip).mean()
        low, high = ops.surrogate.clip_fraction((log_p - old).detach(), s.clip)
        metrics = {"matching": -log_p.detach().mean(), "clip_low": low, "clip_high": high}
        if s.anchor > 0:
            with policy.shadow("anchor"):
                slow = at.predicted(policy)
            drift = ops.matching.error(predicted, slow).mean()
            value, metrics["drift"] = value + s.anchor * drift, drift.detach()
        value = self.held(value, metrics, at, predicted, policy)
        return Loss(value, metrics, gap=(log_p.detach() - old).abs().max(), clip=s.clip)

    def _log_p(self, at: forward.Noised, predicted: Any) -> Any:
        ell = ops.matching.error(predicted, at.target)
        return -ops.matching.weighted(ell, at.sigma, self.settings.weight, self.settings.power)
