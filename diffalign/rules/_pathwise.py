"""The reward's own gradient as a loss, and beside a policy gradient's terms: through the last step and the decoder alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from diffalign.protocols import Loss, Policy, RewardFunction
from diffalign.runtime.settings import Settings, factors
from diffalign.types import Rollout, Term

if TYPE_CHECKING:
    from torch import Tensor


class LastStepSettings(Settings):
    """Keys of `last_step:`."""

    weight: float = Field(0.01, gt=0, description="of its loss", json_schema_extra=factors(0.1, 10))
    ceiling: float | None = Field(
        None,
        description="of the weighted sum of rewards; samples above it do not pull; null: none",
        allow_inf_nan=False,
    )

    def term(self, steps: int) -> Term:
        """Of a sampler of so many steps."""
        return Term(steps - 1, steps, "reward", weight=self.weight)

    def loss(self, term: Term, policy: Policy, part: Rollout, reward: RewardFunction) -> Loss:
        """See `pulled`, of the last step walked again from its stored latent."""
        return pulled(reward(policy.decode(part, policy.replay(part, term.start, term.stop).x)), self.ceiling)


def pulled(value: Tensor, target: float | None) -> Loss:
    """-R, or max(0, target - R), of rewards (N,), averaged."""
    if target is None:
        return Loss(-value.mean())
    below = (target - value).clamp(min=0)
    return Loss(below.mean(), {"below_target": (below > 0).double().mean().detach()})
