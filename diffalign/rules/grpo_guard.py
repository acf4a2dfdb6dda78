"""GRPO-Guard (arXiv 2510.22319): importance ratios that are centred at every step, and steps that weigh alike.

Averaged over D latent dimensions the log-ratio of a step is -mean(dmu^2) / (2 s^2) + <dmu, xi> / (D s), with dmu the mean's
change since the rollout, s the noise's standard deviation and xi the noise. Its expectation is negative and its spread differs
from step to step, so that one clip range cuts one side, and some steps, more than others.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from diffalign import ops
from diffalign.protocols import Loss, Policy
from diffalign.rules import _policy_gradient as policy_gradient
from diffalign.rules import _trust as trust
from diffalign.runtime.settings import factors
from diffalign.types import Credit, Rollout, Term, Update

if TYPE_CHECKING:
    from torch import Tensor

DECAY = 0.9  # of the running spread of log-ratios, per update


class GRPOGuard(policy_gradient.GroupRule):
    """Flow-GRPO's advantages and surrogate on normalised ratios; the bias is each sample's own, for every kernel."""

    name: ClassVar[str] = "grpo_guard"

    class Settings(policy_gradient.GroupSettings):
        """Keys of `rule:` for grpo_guard."""

        clip: float = Field(
            2e-6, gt=0, description="half-width of the normalised ratio's range", json_schema_extra=factors(0.1, 10)
        )
        clip_std: float | None = Field(
            None, gt=0, description="in place of `clip`, in units of the log-ratio's running std, once there is one"
        )
        ratio_norm: Literal["none", "mean", "full"] = Field(
            "full", description="mean: centred; full: and its spread freed of the step's noise; none: Flow-GRPO"
        )
        step_weight: Literal["none", "equal", "inv_dt", "std"] = Field(
            "equal",
            description="a step's weight: inv_dt: 1 / |dt| (paper); equal: alike on predictions; std: its noise",
        )

        def unused(self) -> set[str]:
            """Keys that nothing uses with these settings."""
            return super().unused() | (set() if self.clip_std is None else {"clip"})

    settings: Settings

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__(settings)
        self.spread: float | None = None  # running std of the normalised log-ratio

    @property
    def clip(self) -> float:
        """The clip range in force."""
        s = self.settings
        return s.clip if s.clip_std is None or self.spread is None else s.clip_std * self.spread

    @property
    def power(self) -> int:
        return 0 if self.settings.ratio_norm == "full" else -1

    keeps_mean = True

    def clipped(self, term: Term, policy: Policy, part: Rollout, credit: Credit | None) -> Loss:
        """max(-A r, -A clip(r)) with the normalised ratio r, + kl * divergence, averaged over the part."""
        s = self.settings
        plain = trust.revisited(term.start, policy, part, credit)
        old = part.mean[term.start]
        assert old is not None
        change = (plain.now.mean - old)[part.tree.parent[term.start]]
        log_ratio = normalised(plain.log_ratio, change, plain.now.std, s.ratio_norm)
        step = replace(plain, log_ratio=log_ratio)
        value, metrics = self.surrogate(term, policy, part, step, self.clip)
        spread = log_ratio.detach().square().mean().sqrt()
        if spread > 0:  # not on the first pass, where every ratio is 1
            metrics["log_ratio_std"] = spread
        return Loss(value, metrics, gap=step.gap, clip=self.clip)

    def after_update(self, update: Update) -> None:
        """Keep the running spread of log-ratios."""
        spread = update.metrics.get("log_ratio_std")
        if spread is not None and np.isfinite(spread):
            self.spread = spread if self.spread is None else DECAY * self.spread + (1 - DECAY) * spread

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "spread": self.spread}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.spread = state["spread"]


def normalised(log_ratio: Tensor, change: Tensor, std: float, kind: str) -> Tensor:
    """A mean-reduced log-ratio (N,) of a Gaussian whose mean moved by `change` (N, D...), by GRPO-Guard's ratio normalisation."""
    if kind == "none":
        return log_ratio
    # bias = mean(dmu^2) / (2 s^2), each sample's own
    centred = log_ratio + ops.gaussian.reduce_latent(change.square(), "mean") / (2 * std**2)
    # times s: <dmu, xi> / D, whatever the step
    return centred if kind == "mean" else centred * std
