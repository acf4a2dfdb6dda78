"""A stored step under the present parameters, and how far it may go from the rollout: its ratio clipped, or its Gaussian's divergence
bounded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from diffalign import ops
from diffalign.protocols import Policy, Transition
from diffalign.rules._rule import RuleSettings
from diffalign.types import Credit, Rollout

if TYPE_CHECKING:
    from torch import Tensor


class TrustSettings(RuleSettings):
    """Keys of rules that may bound how far a step's Gaussian moves in place of its ratio."""

    inner_updates: int
    trust: Literal["clip", "kl"] = Field(
        "clip", description="bound ratios, or the steps' divergence from the rollout's (Flow-DPPO)"
    )
    kl_limit: float = Field(
        1e-5, ge=0, description="of that divergence, a mean over latent dims: beyond it a sample may only come back"
    )

    if TYPE_CHECKING:  # a rule's own, where it stands among its keys
        clip: float

    @property
    def cut(self) -> float | None:
        """Half-width of the ratio's range; None where ratios are not cut."""
        return self.clip if self.trust == "clip" else None

    def unused(self) -> set[str]:
        """Keys that nothing uses with these settings."""
        return super().unused() | ({"clip"} if self.trust == "kl" else set())

    def problems(self, steps: int) -> list[str]:
        """What is wrong with these settings for a sampler of `steps` steps."""
        problems = super().problems(steps)
        if self.trust == "clip":
            return [*problems, *self.idle(("kl_limit",), "rule.trust: kl")]
        without = "rule.inner_updates above 1: before the first of them nothing has moved"
        return [*problems, *(self.idle(("trust",), without) if self.inner_updates == 1 else [])]


@dataclass(frozen=True)
class Step:
    """A stored step under the present parameters: log_prob and log_ratio to the rollout's, advantage, all (N_{t+1},); held: what each
    node's divergence weighs (N_t,), None: all alike."""

    now: Transition
    log_prob: Tensor
    log_ratio: Tensor
    advantage: Tensor
    held: Tensor | None = None

    @property
    def gap(self) -> Tensor:
        """Largest |log-ratio|: 0 before the parameters have moved."""
        return self.log_ratio.detach().abs().max()

    @property
    def metrics(self) -> dict[str, Tensor]:
        return {"ratio": self.log_ratio.detach().exp().mean(), "advantage": self.advantage.abs().mean()}


def revisited(step: int, policy: Policy, part: Rollout, credit: Credit | None) -> Step:
    """Run the network at a stored step and compare with the rollout."""
    assert credit is not None
    now, old = policy.transition(part, step), part.log_prob[step]
    assert old is not None, f"step {step} is deterministic"
    new = ops.gaussian.log_prob(part.x[step + 1], now.mean[part.tree.parent[step]], now.std, reduce="mean")
    return Step(now, new, new - old, ops.gaussian.like(credit.edges[step], new), held(step, part, credit, new))


def held(level: int, part: Rollout, credit: Credit, like: Tensor) -> Tensor | None:
    """What the divergence of each node of a level weighs (N_t,): the mean over its leaves; None: all alike."""
    if "held" not in credit.rows:
        return None
    return ops.gaussian.like(ops.advantages.average_to_parents(credit.rows["held"], part.tree.parent)[level], like)


def clipped(step: Step, clip: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean of max(-A r, -A clip(r)) over the part, and how much was clipped."""
    low, high = ops.surrogate.clip_fraction(step.log_ratio.detach(), clip)
    value = ops.surrogate.clipped(step.log_ratio, step.advantage, clip).mean()
    return value, {**step.metrics, "clip_low": low, "clip_high": high}


def trusted(step: Step, part: Rollout, at: int, limit: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean of -A r over the part, without the samples that are beyond a divergence and still move outwards (Flow-DPPO, arXiv 2606.11025).

    D = mean_d (mu - mu_old)^2 / (2 s^2), the divergence of the step's Gaussians per latent dimension; dropped: D >= limit, A (r - 1) > 0.
    """
    old = part.mean[at]
    assert old is not None
    apart = ops.gaussian.divergence(step.now.mean.detach(), old, step.now.std, reduce="mean")[part.tree.parent[at]]
    dropped = (apart >= limit) & (step.advantage * step.log_ratio.detach() > 0)
    value = ops.surrogate.kept(step.log_ratio, step.advantage, ~dropped).mean()
    nats = apart.mean() * step.now.mean[0].numel()
    return value, {**step.metrics, "trust_kl": apart.mean(), "trust_nats": nats, "dropped": dropped.float().mean()}


def bounded(
    step: Step, part: Rollout, at: int, clip: float, trust: TrustSettings | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The surrogate at a step, its ratio clipped, or bounded as `trust` says."""
    if trust is None or trust.trust == "clip":
        return clipped(step, clip)
    return trusted(step, part, at, trust.kl_limit)
