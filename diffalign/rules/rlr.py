"""RLR, the recursive likelihood ratio (arXiv 2502.00639): one pathwise stretch, likelihood-ratio spans before it.

The gradient of E[R] is a sum over the copies of the parameters at each step. Every copy is covered exactly once:

- the last K steps by the reward's own gradient (FO; K = 1 is the paper's),
- a span of steps that ends in a noisy one by that step's noise (HO): with x' = Phi(theta) + std eps, the gradient is
  E[(R - b) d<Phi, eps / std>], the reward's graph is never entered,
- every other step before (C) by a span of its own (`lr`), by noise on the parameters as in the paper (`zo`), or in
  expectation, the span being drawn among blocks and weighing 1 / p (`is`).

Any unbiased estimator may serve each copy, so the sum is unbiased for every choice of the span (theorem 6.3), as long as the
choice does not depend on this update's noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import BeforeValidator, Field

from diffalign import ops
from diffalign.errors import UserError
from diffalign.protocols import GraphBytes, Loss, Needs, Policy, RewardFunction
from diffalign.rules._rule import RewardSettings, Rule
from diffalign.runtime.settings import counts
from diffalign.types import Credit, Plan, Prompts, Rollout, Schedule, Scores, Span, Term, Tree, Update

DECAY = 0.9  # of running gradient norms, per update
GIB = 2**30


def _count(least: int) -> BeforeValidator:
    """A whole number or `auto`: one message for the whole union."""

    def check(value: object) -> object:
        if value == "auto" or (type(value) is int and value >= least):
            return value
        raise ValueError(f"allowed are a whole number from {least}, or auto")

    return BeforeValidator(check)


class RLRSettings(RewardSettings):
    """Keys of `rule:` for rlr."""

    depth: Annotated[Annotated[int, Field(ge=0)] | Literal["auto"], _count(0)] = Field(
        1,
        description="K: last steps with the reward's gradient; 0: none, REINFORCE; auto: as memory_gib allows",
        json_schema_extra=counts(0, 3),
    )
    span: Annotated[Annotated[int, Field(ge=1)] | Literal["auto"], _count(1)] = Field(
        2,
        description="h: noisy steps in the span that borrows its last one's noise; auto: as memory_gib allows",
        json_schema_extra=counts(1, 3),
    )
    cover: Literal["lr", "zo", "is", "none"] = Field(
        "lr",
        description="the others: lr: a span each; zo: noise on parameters (paper); is: drawn blocks, 1 / p; none: biased",
    )
    noise: list[int] | None = Field(None, min_length=1, description="noisy steps; null: all before the last K")
    start: Literal["uniform", "norms"] = Field(
        "uniform", description="norms: spans are drawn in proportion to their gradients' running norms"
    )
    between: tuple[int, int] | None = Field(None, description="steps [first, stop) the span lies in; null: anywhere")
    least_std: float = Field(0.02, ge=0, description="the span's last step is drawn among those with this std or more")
    perturbation: float = Field(0.01, gt=0, description="std of zo's noise on each parameter")
    pairs: int = Field(1, ge=1, description="antithetic pairs of zo per update")
    memory_gib: float | None = Field(
        None, gt=0, description="for the gradient's graph of a micro-batch, weights not counted; with auto"
    )

    def noisy(self, steps: int, depth: int) -> list[int]:
        """The steps that inject noise."""
        return list(range(steps - depth)) if self.noise is None else sorted(set(self.noise))

    def problems(self, steps: int) -> list[str]:
        """What is wrong with these settings for a sampler of `steps` steps."""
        problems = super().problems(steps)
        auto = [name for name in ("depth", "span") if getattr(self, name) == "auto"]
        if bool(auto) != (self.memory_gib is not None):
            given = f"got {self.memory_gib} with depth {self.depth} and span {self.span}"
            wanted = "a number, which auto needs" if auto else "null, as neither is auto"
            problems.append(f"rule.memory_gib: {given}; allowed is {wanted}")
        if self.depth == "auto" and self.noise is not None:
            problems.append("rule.depth: got auto with rule.noise; allowed is a number, or rule.noise null")
        if self.cover == "is" and self.between is not None:
            problems.append("rule.between: got steps with cover is, which must be able to draw all; allowed is null")
        if self.between is not None and not 0 <= self.between[0] < self.between[1] <= steps:
            problems.append(
                f"rule.between: got {list(self.between)}, allowed is 0 <= first < stop <= sampler.steps ({steps})"
            )
        if self.cover != "zo":
            problems += self.idle(("pairs", "perturbation"), "cover zo")
        return problems if problems or "auto" in (self.depth, self.span) else self._uncovered(steps)

    def _uncovered(self, steps: int) -> list[str]:
        assert isinstance(self.depth, int)
        assert isinstance(self.span, int)
        if self.depth >= steps:
            return [
                f"rule.depth: got {self.depth}, allowed is less than sampler.steps ({steps}); all of it is truncated_bp"
            ]
        problems, noisy, last = [], self.noisy(steps, self.depth), steps - self.depth - 1
        if noisy[0] < 0 or noisy[-1] >= steps or last not in noisy:
            problems.append(
                f"rule.noise: got {noisy}, allowed are steps 0 to {steps - 1} with {last}, the one before the last rule.depth, "
                "among them: what lies between two noisy steps is covered by the later one's noise"
            )
        elif self.span > (count := sum(k <= last for k in noisy)):
            problems.append(
                f"rule.span: got {self.span}, allowed is 1 to the number of noisy steps before the last rule.depth ({count})"
            )
        elif self.between is not None and not self.spans(steps, self.depth, self.span):
            problems.append(f"rule.between: got {list(self.between)}, no span of {self.span} noisy steps lies in it")
        return problems

    def cuts(self, steps: int, depth: int) -> list[Span]:
        """The chain before the last `depth` steps, cut after every noisy step."""
        noisy = [k for k in self.noisy(steps, depth) if k < steps - depth]
        return list(zip([0, *(k + 1 for k in noisy)], (k + 1 for k in noisy), strict=False))

    def spans(self, steps: int, depth: int, span: int) -> list[Span]:
        """What can be drawn: every run of `span` cuts, or, for `is`, blocks that cover each stretch once."""
        cut = self.cuts(steps, depth)
        if self.cover == "is":
            return [(cut[k][0], cut[min(k + span, len(cut)) - 1][1]) for k in range(0, len(cut), span)]
        low, high = self.between or (0, steps)
        runs = [(cut[k][0], cut[k + span - 1][1]) for k in range(len(cut) - span + 1)]
        return [(a, b) for a, b in runs if low <= a and b <= high]


class RLR(Rule):
    """The recursive likelihood ratio estimator with sums over latent dimensions and a leave-one-out baseline.

    The baseline belongs to the likelihood-ratio terms alone: in the pathwise one it would do nothing, and dividing advantages
    by their spread would break the balance between the two.
    """

    name: ClassVar[str] = "rlr"

    Settings = RLRSettings
    settings: RLRSettings

    def __init__(self, settings: RLRSettings | None = None) -> None:
        super().__init__(settings)
        self.depth, self.span = self.settings.depth, self.settings.span
        self.norms: dict[Span, float] = {}  # running gradient norms

    @property
    def needs(self) -> Needs:
        s = self.settings
        return Needs(
            groups=True,
            differentiable_reward=s.depth != 0,
            stochastic_sampler=True,
            term_norms=s.start == "norms",
            graph_bytes="auto" in (s.depth, s.span),
        )

    def fit(self, measured: GraphBytes, steps: int) -> None:
        """Choose what is `auto`, the depth first, by the paper's rule for h; terms are freed one by one.

        Raises:
            UserError: if not even one step fits.
        """
        s = self.settings
        assert s.memory_gib is not None
        budget = s.memory_gib * GIB
        if s.depth == "auto":
            longest = fitting_steps(budget - measured.reward - measured.work, measured, steps)
            if longest < 1:
                least = (measured.reward + measured.work + measured.step + measured.stored * (steps - 1)) / GIB
                raise UserError(
                    f"rule.memory_gib: got {s.memory_gib:g}, one step with decoder and reward takes {least:.3g}; allowed is more, "
                    "a smaller optimizer.micro_batch, or memory.checkpoint"
                )
            self.depth = min(longest, steps - 1)
        assert isinstance(self.depth, int)
        if s.span == "auto":
            count = len(s.cuts(steps, self.depth))
            self.span = max(1, min(fitting_steps(budget - measured.work, measured, steps), steps // 2 - 1, count))

    def plan(self, schedule: Schedule, update: int, rng: np.random.Generator) -> Plan:
        """Sample to the end; FO on the last K steps, HO on a drawn span, and whatever covers the rest.

        Raises:
            UserError: if no step that may end a span has noise enough.
        """
        s, steps = self.settings, schedule.steps
        assert isinstance(self.depth, int)
        assert isinstance(self.span, int)
        noisy = s.noisy(steps, self.depth)
        if still := [k for k in noisy if k < steps - self.depth and not schedule.std[k] > 0]:
            raise UserError(
                f"rule: steps {still} have no noise with this sampler, so theirs cannot be borrowed; see rule.noise"
            )
        drawable = s.spans(steps, self.depth, self.span)
        spans = [span for span in drawable if s.cover == "is" or schedule.std[span[1] - 1] >= s.least_std]
        if not spans:
            highest = max(schedule.std[stop - 1] for _, stop in drawable)
            raise UserError(
                f"rule.least_std: got {s.least_std:g}, allowed is {highest:.3g} or less, the most a span ends in"
            )
        chance = self._chances(spans)
        drawn = int(rng.choice(len(spans), p=chance))
        start, stop = spans[drawn]
        weight = 1 / chance[drawn] if s.cover == "is" else 1.0
        terms = [Term(steps - self.depth, steps, "reward")] if self.depth else []
        terms += [Term(start, stop, "log_prob", weight)]
        rest = [cut for cut in s.cuts(steps, self.depth) if cut[1] <= start or cut[0] >= stop]
        if s.cover == "lr":
            terms += [Term(a, b, "log_prob") for a, b in rest]
        elif s.cover == "zo" and rest:
            copies = tuple(k for a, b in rest for k in range(a, b))
            draws = rng.integers(1, 2**62, s.pairs)
            terms += [Term(copies[0], steps, "parameters", 1 / s.pairs, copies, int(draw)) for draw in draws]
        return Plan(steps, tuple(k in noisy for k in range(steps)), (tuple(terms),))

    def _chances(self, spans: Sequence[Span]) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Equal, or in proportion to running norms; a span not yet seen counts as their mean."""
        seen = [self.norms[span] for span in spans if span in self.norms]
        if self.settings.start == "uniform" or not sum(seen) > 0:
            return np.full(len(spans), 1 / len(spans))
        norms = np.array([self.norms.get(span, float(np.mean(seen))) for span in spans])
        return norms / norms.sum()

    def credit(self, tree: Tree, scores: Scores, prompts: Prompts) -> Credit:
        """R less the mean of the others of its group: a baseline that does not depend on the sample's own noise."""
        advantage = ops.advantages.leave_one_out(scores.total, prompts.group[tree.leaf_root], scores.valid)
        return Credit(ops.advantages.average_to_parents(advantage, tree.parent)[1:])

    def loss(self, term: Term, policy: Policy, part: Rollout, credit: Credit | None, reward: RewardFunction) -> Loss:
        """-R(x_0) through the last K steps, or an estimate of its gradient at earlier copies, averaged over the part."""
        if term.through == "parameters":
            return self._perturbed(term, policy, part, reward)
        span = policy.replay(part, term.start, term.stop)
        if term.through == "reward":
            return Loss(-reward(policy.decode(part, span.x)).mean())
        assert credit is not None
        eps = part.eps[term.stop - 1]
        assert eps is not None, f"step {term.stop - 1} is deterministic"
        inner = ops.gaussian.score_inner(span.mean, eps, span.std)
        # -(R - b) <Phi, eps / std>, summed over latent dimensions: with a mean it would have 1 / D of its weight beside the
        # pathwise term.
        value = -(ops.gaussian.like(credit.edges[term.stop - 1], inner) * inner).mean()
        return Loss(value, gap=(span.x.detach() - part.x[term.stop]).abs().max())

    def _perturbed(self, term: Term, policy: Policy, part: Rollout, reward: RewardFunction) -> Loss:
        """(R+ - R-) / (2 s) zeta with noise zeta_i of its own on every step's parameters, on the sample's own noises."""
        assert term.steps is not None
        ends = []
        for scale in (self.settings.perturbation, -self.settings.perturbation):
            with policy.shifted(term.draw, term.steps, scale):
                ends.append(reward(policy.decode(part, policy.replay(part, term.start, term.stop).x)))
        # A sample without a score at either end carries no weight.
        apart = (ends[0] - ends[1]).nan_to_num(0.0, 0.0, 0.0).mean()
        # sum_i d J / d theta_i ~ (R+ - R-) / (2 s) sum_i zeta_i, s the noise's std
        slope = apart / (2 * self.settings.perturbation)
        return Loss(-slope * policy.along(term.draw, term.steps), {"slope": slope})

    def after_update(self, update: Update) -> None:
        """Keep running norms of the spans' gradients."""
        for span, norm in update.term_norms.items():
            if np.isfinite(norm):
                self.norms[span] = DECAY * self.norms.get(span, norm) + (1 - DECAY) * norm

    def state_dict(self) -> dict[str, Any]:
        norms = {f"{start}-{stop}": norm for (start, stop), norm in self.norms.items()}
        return {**super().state_dict(), "norms": norms, "depth": self.depth, "span": self.span}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        spans = {key: key.split("-") for key in state["norms"]}
        self.norms = {(int(start), int(stop)): state["norms"][key] for key, (start, stop) in spans.items()}
        self.depth, self.span = state["depth"], state["span"]


def fitting_steps(budget: float, measured: GraphBytes, steps: int) -> int:
    """How many of `steps` steps can hold their graph within a budget in bytes, at least 0.

    The first entry of h* (arXiv 2502.00639, sec. 6): floor((B - B_z (T - 1)) / (B_h - B_z)), with B_h what a step takes with
    its graph and B_z what it takes without.
    """
    return max(0, int((budget - measured.stored * (steps - 1)) // (measured.step - measured.stored)))
