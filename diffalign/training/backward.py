"""The gradient of an optimiser step: term by term and micro-batch by micro-batch, each graph freed before the next."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from diffalign.errors import Fault
from diffalign.protocols import TrainablePolicy
from diffalign.rewards.scorer import Scorer, Tally
from diffalign.rules import Rule
from diffalign.runtime.distributed import World
from diffalign.runtime.progress import Progress, silent
from diffalign.types import Credit, Floats, Integers, Rollout, Span, Term, chunks

# Largest |log-ratio| of a first pass. On the CPU the same kernels run twice, and only the order of a sum in float64 may differ; elsewhere
# it is a tenth of the clip range, so that no row can be clipped, and at most 1e-4: rounding stored latents to bfloat16 after their
# log-prob, the commonest mistake, gives 4e-4 and more.
EXACT_GAP, CLOSE_GAP, OF_CLIP = 1e-12, 1e-4, 0.1
COMPILED = (
    "compiled blocks round differently with and without a graph; allowed with this rule are speed=graphs, speed=eager"
)
Noted = dict["str | Span", Tensor]
Logged = dict["str | Span", float]  # numbers by name; norms of terms' gradients by their steps


def read(values: Sequence[Tensor]) -> list[float]:
    """Numbers off tensors of one element, all at once: each read on its own waits for the device."""
    return torch.stack([value.reshape(()) for value in values]).tolist() if values else []


def step(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], longest: float, world: World) -> float | None:
    """Add the processes' gradients up, shorten a longer one, and step; its norm before, None where that is not finite and nothing moves."""
    for parameter in parameters:
        if parameter.grad is None:  # a part of the model that no term touched
            parameter.grad = torch.zeros_like(parameter)
    world.add_up([parameter.grad for parameter in parameters if parameter.grad is not None])
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, longest))
    if not math.isfinite(norm):
        return None
    optimizer.step()
    return norm


@dataclass(frozen=True)
class Share:
    """Of an optimiser step what is about the samples of one plan.

    credit: for each term; totals: N of each of the rollout's n samples, the same within a micro-batch: a part of n of N samples weighs
    n / N; None: as many as it has.
    """

    terms: tuple[Term, ...]
    rollout: Rollout
    credit: Sequence[Credit | None]
    totals: Integers | None = None

    def parts(self, micro_batch: int) -> Iterator[tuple[Rollout, list[Credit | None], float]]:
        """Its micro-batches, with the credit of each for every term and what it weighs."""
        count = len(self.rollout.prompts)
        totals = np.full(count, count) if self.totals is None else self.totals
        for rows in chunks(count, micro_batch):
            assert (totals[rows] == totals[rows[0]]).all(), "a micro-batch of groups that weigh differently"
            # Terms mostly share one credit.
            own = {id(whole): whole and whole.select(self.rollout.tree, rows) for whole in self.credit}
            credit = [own[id(whole)] for whole in self.credit]
            yield self.rollout.select(rows), credit, len(rows) / int(totals[rows[0]])


@dataclass
class Backward:
    """Adds up gradients of a rule's terms.

    term_norms: whether the norm of every term's own gradient is wanted; tally: of the samples that the last step asked rewards about.
    """

    rule: Rule
    policy: TrainablePolicy
    scorer: Scorer
    term_norms: bool = False
    progress: Progress = silent
    tally: Tally = field(default_factory=Tally)
    gap: float = 0.0  # how far a first pass was from its rollout at most, so far

    def accumulate(self, shares: Sequence[Share], *, first: bool, where: str = "") -> Logged:
        """Add the gradient of an optimiser step's terms to the parameters; `first`: they have not moved since the rollout.

        The cut into micro-batches and processes does not change the gradient, as each weighs what it has of all samples.

        Raises:
            Fault: if a first pass differs from the rollout, saying `where`.
        """
        self.tally = Tally()
        noted: list[tuple[str | Span, float, Tensor]] = []  # name, share of the samples, value: read when all is done
        gaps: list[tuple[Tensor, Term, float | None]] = []
        micro_batch, done = self.policy.micro_batch, 0
        count = sum(-(-len(share.rollout.prompts) // micro_batch) * len(share.terms) for share in shares)
        for share in shares:
            for part, credits, weight in share.parts(micro_batch):
                for term, credit in zip(share.terms, credits, strict=True):
                    self.progress("training", done, count)
                    done += 1
                    gap, clip, logged, slope = self._term(term, part, credit, weight)
                    if slope is not None:
                        part = replace(part, slope={**part.slope, term.start: slope})
                    noted += [(name, weight, value) for name, value in logged.items()]
                    if first and gap is not None:
                        gaps.append((gap, term, clip))
        numbers = read([*(value for *_, value in noted), *(gap for gap, *_ in gaps)])
        for (_, term, clip), apart in zip(gaps, numbers[len(noted) :], strict=True):
            self._check_gap(apart, clip, where, term)
        sums: Logged = defaultdict(float)
        weights: Logged = defaultdict(float)
        for (name, weight, _), number in zip(noted, numbers, strict=False):
            sums[name] += weight * number
            weights[name] += weight
        return {name: value / weights[name] for name, value in sums.items()}

    @torch.no_grad()
    def look(self, terms: tuple[Term, ...], rollout: Rollout) -> list[dict[str, Floats]]:
        """For each term the numbers (N_T,) that the rule wants of the rollout's leaves before a gradient."""
        found: list[dict[str, list[Tensor]]] = [defaultdict(list) for _ in terms]
        parts = list(chunks(len(rollout.prompts), self.policy.micro_batch))
        for at, rows in enumerate(parts):
            part = rollout.select(rows)
            for place, (term, numbers) in enumerate(zip(terms, found, strict=True)):
                self.progress("looking", at * len(terms) + place, len(parts) * len(terms))
                for name, values in self.rule.look(term, self.policy, part).items():
                    numbers[name].append(values)
        return [
            {name: np.asarray(torch.cat(each).double().cpu()) for name, each in numbers.items()} for numbers in found
        ]

    def _term(
        self, term: Term, part: Rollout, credit: Credit | None, share: float
    ) -> tuple[Tensor | None, float | None, Noted, Tensor | None]:
        """One term on one part; its gap and clip range (see `Loss`), what it logs, and the slope that it keeps, all without a graph."""
        leaf = None
        if term.keep_slope:
            part, leaf = part.entered(term.start)
        seen: dict[str, Tensor] = {}
        reward = self.scorer.pathwise(part.prompts.select(part.tree.leaf_root), seen, self.tally)
        loss = self.rule.loss(term, self.policy, part, credit, reward)
        logged: Noted = {name: value.detach() for name, value in {**seen, **loss.metrics}.items()}
        scale = 1.0 if self.term_norms else term.weight * share  # of the loss whose gradient is taken
        if (norm := self._backward(term, loss.value, share)) is not None:
            logged[term.start, term.stop] = norm
        slope = None if leaf is None or leaf.grad is None else leaf.grad / scale
        return None if loss.gap is None else loss.gap.detach(), loss.clip, logged, slope

    def _backward(self, term: Term, value: Tensor, share: float) -> Tensor | None:
        """Add a term's gradient; the norm of the part's own, unweighted, where it is asked for and reaches the parameters."""
        if not self.term_norms:
            (value * (term.weight * share)).backward()
            return None
        parameters = list(self.policy.parameters.values())
        sums = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        value.backward()
        own = [p.grad for p in parameters]
        for parameter, old, new in zip(parameters, sums, own, strict=True):
            if new is not None:
                scaled = new * (term.weight * share)
                parameter.grad = scaled if old is None else old + scaled
            else:
                parameter.grad = old
        norms = [g.norm() for g in own if g is not None]
        return torch.stack(norms).norm() if norms else None

    def _check_gap(self, gap: float, clip: float | None, where: str, term: Term) -> None:
        close = CLOSE_GAP if clip is None else min(CLOSE_GAP, OF_CLIP * clip)
        allowed = EXACT_GAP if self.policy.exact else close
        self.gap = max(self.gap, gap)
        if not gap <= allowed:
            raise Fault(
                f"{where}, step {term.start}: the replay differs from the rollout by {gap:.3g} "
                f"(allowed {allowed:g}): "
                + (COMPILED if self.policy.lossy else "sampling and training do not see the same latents or network")
            )
