"""AWM, advantage-weighted matching (arXiv 2509.25050): the pretraining loss on a policy's own samples, weighted by advantages.

With `implicit` a row weighs what is left between its advantage and its implicit reward, the change of its log-density since the reference:
the loss stops where a group fits. These are DGPO (group), centred regression (residual) and listwise GDRO, see `ops.implicit`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from diffalign import ops
from diffalign.protocols import Loss, Needs, Policy, RewardFunction
from diffalign.rules import _forward as forward
from diffalign.runtime.settings import factors
from diffalign.types import Credit, Floats, Integers, Plan, Prompts, Rollout, Schedule, Scores, Term, Tree

if TYPE_CHECKING:
    from torch import Tensor


class AWM(forward.ForwardRule):
    """A clipped surrogate on log p = -w(|v - v*|^2, t), held near a slow copy of itself.

    With a negative advantage the loss has no lower bound: a growth function that flattens (ghuber) and the anchor are part of
    the rule, not an option to do without.
    """

    name: ClassVar[str] = "awm"

    class Settings(forward.ForwardSettings):
        """Keys of `rule:` for awm."""

        weight: Literal["uniform", "t", "t2", "huber", "ghuber", "adaptive"] = Field(
            "ghuber",
            description="w, of the squared error and t; adaptive: of x_0, over its size",
        )
        power: float = Field(0.25, gt=0, le=1, description="p of ghuber")
        row: Literal["clipped", "ratio", "proximal"] = Field(
            "clipped",
            description="what a row weighs: clipped A r; ratio: A r (EPG); proximal: r (A - kappa log r) (PEPG)",
        )
        kappa: float = Field(1.0, ge=0, description="of proximal: it stops at log r = A / kappa")
        old_decay: float | None = Field(
            None,
            ge=0,
            le=1,
            description="of a slow policy that samples, reached in steps of 0.001; null: none",
        )
        clip: float = Field(
            1.0, gt=0, description="half-width of the ratio's range", json_schema_extra=factors(0.1, 10)
        )
        anchor: float = Field(
            1.0, ge=0, description="weight of mean (v - v_anchor)^2, to a slow copy", json_schema_extra=factors(0.1, 10)
        )
        anchor_decay: float = Field(
            0.3, ge=0, le=1, description="of the copy per update, reached from 0 in steps of 0.001"
        )
        implicit: Literal["none", "group", "residual", "listwise"] = Field(
            "none",
            description="fit a group's implicit rewards: group: DGPO; residual: CRD; listwise: GDRO",
        )
        implicit_beta: float | None = Field(
            None, gt=0, description="of the implicit reward; null: 100 for group, 1 for others"
        )
        implicit_to: Literal["reference", "anchor"] = Field(
            "reference", description="whose log-density it is measured against"
        )

        @property
        def referred(self) -> bool:
            """Whether anything is held against the reference."""
            return super().referred or (self.implicit != "none" and self.implicit_to == "reference")

        @property
        def beta(self) -> float:
            """Of the implicit reward."""
            return self.implicit_beta or {"group": 100.0}.get(self.implicit, 1.0)

        def problems(self, steps: int) -> list[str]:
            """What is wrong with these settings for a sampler of `steps` steps."""
            problems = super().problems(steps)
            problems += [] if self.row == "proximal" else self.idle(("kappa",), "rule.row: proximal")
            problems += [] if self.row == "clipped" else self.idle(("clip",), "rule.row: clipped")
            if self.implicit == "none":
                return [*problems, *self.idle(("implicit_beta", "implicit_to"), "rule.implicit")]
            if self.implicit_to == "anchor" and not (self.anchor > 0 and self.anchor_decay > 0):
                problems.append("rule.implicit_to: got anchor; allowed with rule.anchor and rule.anchor_decay above 0")
            return problems

        def unused(self) -> set[str]:
            """Keys that nothing uses with these settings."""
            first = self.inner_updates == 1 and self.old_decay is None  # on a first pass every ratio is 1
            return {"clip"} if first or self.row != "clipped" else set()

    settings: Settings

    @property
    def needs(self) -> Needs:
        s = self.settings
        implicit = s.implicit != "none"
        return Needs(
            groups=True,
            reference=s.referred,
            stochastic_sampler=s.noise,
            anchored=s.kl > 0
            or s.anchor > 0
            or implicit,  # a group without spread still draws its implicit rewards together
            looks=implicit,
            exact_steps=False,
        )

    def decays(self, update: int) -> dict[str, float]:
        s = self.settings
        anchor = {"anchor": forward.rising(update, s.anchor_decay)} if s.anchor > 0 else {}
        if s.old_decay is not None:
            return {**anchor, "old": forward.rising(update, s.old_decay)}
        return {**anchor, "old": 0.0} if s.inner_updates > 1 else anchor  # old: the policy that samples

    def plan(self, schedule: Schedule, update: int, rng: np.random.Generator) -> Plan:
        return forward.plan(schedule, self.settings, rng, "" if self.settings.old_decay is None else "old")

    def credit(self, tree: Tree, scores: Scores, prompts: Prompts) -> Credit:
        credit = super().credit(tree, scores, prompts)
        return (
            credit if self.settings.implicit == "none" else replace(credit, rows={"scored": scores.valid.astype(float)})
        )

    def look(self, term: Term, policy: Policy, part: Rollout) -> dict[str, Tensor]:
        """The implicit reward R = log p - log p_ref, of the same noise."""
        at = forward.noised(term, policy, part, self.settings.shared_noise)
        own = self._log_p(at, at.predicted(policy))
        with policy.reference() if self.settings.implicit_to == "reference" else policy.shadow("anchor"):
            return {"implicit": own - self._log_p(at, at.predicted(policy))}

    def settle(self, looked: dict[str, Floats], credit: Credit, group: Integers) -> dict[str, Floats]:
        """What a row weighs in place of A / limit."""
        s, valid = self.settings, credit.rows["scored"] > 0
        of = {"group": ops.implicit.group_gate, "residual": ops.implicit.residual, "listwise": ops.implicit.listwise}[
            s.implicit
        ]
        weights = of(credit.edges[-1] * s.advantage_limit, looked["implicit"], group, valid, s.beta)
        return {"weight": weights / s.advantage_limit, "implicit": looked["implicit"]}

    def loss(self, term: Term, policy: Policy, part: Rollout, credit: Credit | None, reward: RewardFunction) -> Loss:
        """max(-A r, -A clip(r)) with log r = w(ell_old) - w(ell), or what `row` says, and anchor, kl and norm terms, averaged."""
        assert credit is not None
        s = self.settings
        at = forward.noised(term, policy, part, s.shared_noise)
        predicted = at.predicted(policy)
        log_p = self._log_p(at, predicted)
        old = log_p.detach()
        if s.inner_updates > 1 or s.old_decay is not None:
            with policy.shadow("old"):
                old = self._log_p(at, at.predicted(policy))
        advantage = ops.gaussian.like(credit.rows.get("weight", credit.edges[-1]), log_p)
        value = self._row(log_p, old, advantage).mean()
        low, high = ops.surrogate.clip_fraction((log_p - old).detach(), s.clip)
        metrics = {"matching": -log_p.detach().mean(), "clip_low": low, "clip_high": high}
        if "implicit" in credit.rows:
            metrics["implicit"] = ops.gaussian.like(credit.rows["implicit"], log_p).abs().mean()
        if s.anchor > 0:
            with policy.shadow("anchor"):
                slow = at.predicted(policy)
            drift = ops.matching.error(predicted, slow).mean()
            value, metrics["drift"] = value + s.anchor * drift, drift.detach()
        value = self.held(value, metrics, at, predicted, policy, credit)
        gap = (log_p.detach() - old).abs().max() if s.old_decay is None else None  # a slow copy is not what is trained
        return Loss(value, metrics, gap=gap, clip=s.clip)

    def _row(self, log_p: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
        """What is minimised of each row (N,); at r = 1 the gradients of all three are those of -A log p."""
        s, log_ratio = self.settings, (log_p - old).detach()
        if s.row == "clipped":
            return ops.surrogate.clipped(log_p - old, advantage, s.clip)
        kept = advantage - (s.kappa * log_ratio if s.row == "proximal" else 0.0)
        return -log_ratio.exp() * kept * log_p

    def _log_p(self, at: forward.Noised, predicted: Any) -> Any:
        if self.settings.weight == "adaptive":
            return -at.clean_error(predicted)
        ell = ops.matching.error(predicted, at.target)
        return -ops.matching.weighted(ell, at.sigma, self.settings.weight, self.settings.power)
