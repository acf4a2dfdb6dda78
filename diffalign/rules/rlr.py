"""RLR, the recursive likelihood ratio (arXiv 2502.00639): one pathwise stretch, likelihood-ratio spans before it.

The gradient of E[R] is a sum over the copies of the parameters at each step. Every copy is covered exactly once:

- the last K steps by the reward's own gradient (FO; K = 1 is the paper's),
- a span of steps that ends in a noisy one by that step's noise (HO): with x' = Phi(theta) + std eps, the gradient is
  E[(R - b) d<Phi, eps / std>], the reward's graph is never entered,
- every other step before by a span of its own (C).

Any unbiased estimator may serve each copy, so the sum is unbiased for every choice of the span (theorem 6.3).
"""

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


class RLR:
    """The recursive likelihood ratio estimator with sums over latent dimensions and a leave-one-out baseline.

    The baseline belongs to the likelihood-ratio terms alone: in the pathwise one it would do nothing, and dividing advantages
    by their spread would break the balance between the two.
    """

    name: ClassVar[str] = "rlr"

    class Settings(Settings):
        """Keys of `rule:` for rlr."""

        depth: int = Field(1, ge=1, description="K: last steps with the reward's gradient")
        span: int = Field(2, ge=1, description="h: noisy steps in the span that borrows its last one's noise")
        cover: Literal["lr", "none"] = Field(
            "lr", description="the other steps: lr: spans of one noisy step each; none: left out, biased"
        )
        noise: list[int] | None = Field(None, min_length=1, description="noisy steps; null: all before the last K")
        least_std: float = Field(
            0.02, ge=0, description="the span's last step is drawn among those with this std or more"
        )

        def noisy(self, steps: int) -> list[int]:
            """The steps that inject noise."""
            return list(range(steps - self.depth)) if self.noise is None else sorted(set(self.noise))

        def problems(self, steps: int) -> list[str]:
            """What is wrong with these settings for a sampler of `steps` steps."""
            if self.depth >= steps:
                return [
                    f"rule.depth: got {self.depth}, allowed is less than sampler.steps ({steps}); all of it is truncated_bp"
                ]
            noisy, last = self.noisy(steps), steps - self.depth - 1
            found = []
            if noisy[0] < 0 or noisy[-1] != last:
                found.append(
                    f"rule.noise: got {noisy}, allowed are steps 0 to {last} with {last}, the one before the last rule.depth, among "
                    "them: what lies between two noisy steps is covered by the later one's noise"
                )
            if self.span > len(noisy):
                found.append(f"rule.span: got {self.span}, allowed is 1 to the number of noisy steps ({len(noisy)})")
            return found

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or self.Settings()

    @property
    def needs(self) -> Needs:
        return Needs(groups=True, differentiable_reward=True, stochastic_sampler=True)

    def plan(self, schedule: Schedule, update: int, rng: np.random.Generator) -> Plan:
        """Sample to the end; FO on the last K steps, HO on a drawn span, a span for every other noisy step."""
        s, steps = self.settings, schedule.steps
        noisy = s.noisy(steps)
        # A stretch ends with a noisy step and holds the deterministic ones before it.
        stretches = list(zip([0, *(k + 1 for k in noisy)], (k + 1 for k in noisy), strict=False))
        ends = [k for k in range(s.span - 1, len(noisy)) if schedule.std[noisy[k]] >= s.least_std]
        end = int(rng.choice(ends or [len(noisy) - 1]))
        chosen = range(end - s.span + 1, end + 1)
        spans = [(stretches[chosen[0]][0], stretches[chosen[-1]][1])]
        if s.cover == "lr":
            spans += [stretch for k, stretch in enumerate(stretches) if k not in chosen]
        terms = (Term(steps - s.depth, steps, "reward"), *(Term(a, b, "log_prob") for a, b in spans))
        return Plan(steps, tuple(k in noisy for k in range(steps)), (terms,))

    def credit(self, tree: Tree, scores: Scores, prompts: Prompts) -> Credit:
        """R less the mean of the others of its group: a baseline that does not depend on the sample's own noise."""
        advantage = ops.advantages.leave_one_out(scores.total, prompts.group[tree.leaf_root], scores.valid)
        return ops.advantages.average_to_parents(advantage, tree.parent)[1:]

    def loss(self, term: Term, policy: Policy, part: Rollout, credit: Credit | None, reward: RewardFunction) -> Loss:
        """-R(x_0) through the last K steps, or -(R - b) <Phi, eps / std> of a span, averaged over the part."""
        span = policy.replay(part, term.start, term.stop)
        if term.through == "reward":
            return Loss(-reward(policy.decode(part, span.x)).mean())
        assert credit is not None
        eps = part.eps[term.stop - 1]
        assert eps is not None, f"step {term.stop - 1} is deterministic"
        advantage = span.mean.new_tensor(credit[term.stop - 1])
        # Summed over latent dimensions: with a mean this would be 1 / D of its weight beside the pathwise term.
        value = -(advantage * ops.gaussian.score_inner(span.mean, eps, span.std)).mean()
        return Loss(value, gap=(span.x.detach() - part.x[term.stop]).abs().max())
