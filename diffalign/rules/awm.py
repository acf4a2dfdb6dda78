"""AWM, advantage-weighted matching (arXiv 2509.25050): the pretraining loss on a policy's own samples, weighted by advantages.

With `implicit` a row weighs what is left between its advantage and its implicit reward, the change of its log-density since the reference:
the loss stops where a group fits. These are DGPO (group), centred regression (residual) and listwise GDRO, see `ops.implicit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from diffalign import ops
from diffalign.errors import UserError
from diffalign.protocols import Loss, Needs, Policy, RewardFunction
from diffalign.rules import _forward as forward
from diffalign.rules._awm import AWMSettings
from diffalign.types import Credit, Floats, Integers, Plan, Prompts, Rollout, Schedule, Scores, Term, Tree

if TYPE_CHECKING:
    from torch import Tensor


class AWM(forward.ForwardRule):
    """A clipped surrogate on log p = -w(|v - v*|^2, t), held near a slow copy of itself.

    With a negative advantage the loss has no lower bound: a growth function that flattens (ghuber) and the anchor are part of
    the rule, not an option to do without.
    """

    name: ClassVar[str] = "awm"
    Settings = AWMSettings
    settings: AWMSettings

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
            looks=implicit or s.ratio_over == "sample",
            exact_steps=False,
        )

    def decays(self, update: int) -> dict[str, float]:
        s = self.settings
        anchor = {"anchor": forward.rising(update, s.anchor_decay)} if s.anchored else {}
        if s.old_decay is not None:
            return {**anchor, "old": forward.rising(update, s.old_decay)}
        return {**anchor, "old": 0.0} if s.delayed else anchor  # old: the policy that samples

    def plan(self, schedule: Schedule, update: int, rng: np.random.Generator) -> Plan:
        """See `forward.plan`.

        Raises:
            UserError: for `weight: elbo` at a level without signal.
        """
        levels = self.settings.candidates(schedule.steps)
        if self.settings.weight == "elbo" and schedule.alpha[levels.start] == 0:
            raise UserError("rule.first_level: got true, pure noise has no finite weight: elbo; allowed is false")
        return forward.plan(schedule, self.settings, rng, "" if self.settings.old_decay is None else "old")

    def credit(self, tree: Tree, scores: Scores, prompts: Prompts) -> Credit:
        credit = super().credit(tree, scores, prompts)
        return (
            credit if self.settings.implicit == "none" else replace(credit, rows={"scored": scores.valid.astype(float)})
        )

    def look(self, term: Term, policy: Policy, part: Rollout) -> dict[str, Tensor]:
        """The implicit reward log p - log p_ref and the log-ratio log p - log p_old of the same noise, each where it is asked for."""
        s = self.settings
        at = forward.noised(term, policy, part, s.shared_noise)
        own, found = self._log_p(at, at.predicted(policy)), {}
        if s.implicit != "none":
            with policy.reference() if s.implicit_to == "reference" else policy.shadow("anchor"):
                found["implicit"] = own - self._log_p(at, at.predicted(policy))
        if s.ratio_over == "sample":
            with policy.shadow("old"):
                found["log_ratio"] = own - self._log_p(at, at.predicted(policy))
        return found

    def settle(
        self, terms: Sequence[Term], looked: Sequence[dict[str, Floats]], credit: Credit, group: Integers
    ) -> list[dict[str, Floats]]:
        """What a row weighs in place of A / limit at each term, and its log-ratio, which is one for all of them."""
        rows: list[dict[str, Floats]] = [{} for _ in terms]
        if self.settings.implicit != "none":
            rows = [self._fitted(numbers["implicit"], credit, group) for numbers in looked]
        if self.settings.ratio_over == "sample":
            # before exp: the mean over draws, each by its share of the levels (V-GRPO, arXiv 2604.23380)
            whole = sum(term.weight for term in terms)
            mean = np.sum(
                [term.weight / whole * numbers["log_ratio"] for term, numbers in zip(terms, looked, strict=True)], 0
            )
            rows = [{**own, "log_ratio": mean} for own in rows]
        return rows

    def _fitted(self, implicit: Floats, credit: Credit, group: Integers) -> dict[str, Floats]:
        """What rows weigh by their implicit rewards (N,) at a term."""
        s, valid = self.settings, credit.rows["scored"] > 0
        of = {"group": ops.implicit.group_gate, "residual": ops.implicit.residual, "listwise": ops.implicit.listwise}[
            s.implicit
        ]
        weights = of(credit.edges[-1] * s.advantage_limit, implicit, group, valid, s.beta)
        return {"weight": weights / s.advantage_limit, "implicit": implicit}

    def loss(self, term: Term, policy: Policy, part: Rollout, credit: Credit | None, reward: RewardFunction) -> Loss:
        """max(-A r, -A clip(r)) with log r = w(ell_old) - w(ell), or what `row` says, and anchor, kl and norm terms, averaged."""
        assert credit is not None
        s = self.settings
        at = forward.noised(term, policy, part, s.shared_noise)
        predicted = at.predicted(policy)
        log_p = self._log_p(at, predicted)
        old = None
        if s.delayed and s.ratio_over == "draw":
            with policy.shadow("old"):
                old = at.predicted(policy)
        log_ratio = self._log_ratio(at, old, log_p, credit)
        advantage = ops.gaussian.like(credit.rows.get("weight", credit.edges[-1]), log_p)
        value = self._row(log_p, log_ratio, advantage).mean()
        low, high = ops.surrogate.clip_fraction(log_ratio.detach(), s.clip)
        metrics = {"matching": -log_p.detach().mean(), "clip_low": low, "clip_high": high}
        if "implicit" in credit.rows:
            metrics["implicit"] = ops.gaussian.like(credit.rows["implicit"], log_p).abs().mean()
        if s.anchor > 0:
            slow = old if s.anchor_to == "old" else None
            if slow is None:
                with policy.shadow(s.anchor_to):
                    slow = at.predicted(policy)
            drift = ops.matching.error(predicted, slow).mean()
            value, metrics["drift"] = value + s.anchor * drift, drift.detach()
        value = self.held(value, metrics, at, predicted, policy, credit)
        gap = log_ratio.detach().abs().max() if s.old_decay is None else None  # a slow copy is not what is trained
        if gap is not None and s.weight == "elbo":  # a sum over dimensions rounds as its size does
            gap = gap / log_p.detach().abs().max().clamp(min=1)
        return Loss(value, metrics, gap=gap, clip=s.clip)

    def _log_ratio(self, at: forward.Noised, old: Tensor | None, log_p: Tensor, credit: Credit) -> Tensor:
        """log r (N,), whose gradient is that of log p: of these draws, or as it was settled for all of a row's draws."""
        if self.settings.ratio_over == "sample":
            # d log r = sum_j w_j d log p_j, and the terms are weighed by w_j: each adds its own part
            return ops.gaussian.like(credit.rows["log_ratio"], log_p) + (log_p - log_p.detach())
        return log_p - (log_p.detach() if old is None else self._log_p(at, old))

    def _row(self, log_p: Tensor, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        """What is minimised of each row (N,); at r = 1 the gradients of all four are those of -A log p."""
        s, fixed = self.settings, log_ratio.detach()
        if s.row == "clipped":
            return ops.surrogate.clipped(log_ratio, advantage, s.clip)
        if s.row == "advantage":
            return -advantage * log_p
        kept = advantage - (s.kappa * fixed if s.row == "proximal" else 0.0)
        return -fixed.exp() * kept * log_p

    def _log_p(self, at: forward.Noised, predicted: Any) -> Any:
        if self.settings.weight == "adaptive":
            return -at.clean_error(predicted)
        if self.settings.weight == "elbo":
            levels = np.asarray(self.settings.candidates(at.schedule.steps))
            alpha, sigma = at.schedule.alpha[levels], at.schedule.sigma[levels]
            weights = ops.matching.elbo_weights(alpha, sigma, at.prediction)
            return -float(weights[at.step - levels[0]]) * ops.matching.error(predicted, at.target, "sum")
        ell = ops.matching.error(predicted, at.target)
        return -ops.matching.weighted(ell, at.sigma, self.settings.weight, self.settings.power)
