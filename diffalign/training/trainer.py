"""The one update: plan, sample, score, credit, backward, step. No rule's name appears here."""

from __future__ import annotations

import functools
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from diffalign.errors import Fault, Unscored, one_line
from diffalign.rewards.base import Background, Reward, begin, check_media, unscored
from diffalign.runtime.distributed import ALONE, World
from diffalign.runtime.memory import out_of_memory, release
from diffalign.runtime.randomness import numpy_generator
from diffalign.types import (
    Credit,
    Floats,
    Integers,
    Media,
    Plan,
    Prompts,
    RewardFunction,
    Rollout,
    Rows,
    Scores,
    Term,
    TrainablePolicy,
    Tree,
    UpdateRule,
    chunks,
)

T = TypeVar("T")
Metrics = dict[str, float]
# Largest |log-ratio| of a first pass. On the CPU the same kernels run twice; elsewhere 1e-4 is the usual clip range, and rounding
# stored latents to bfloat16 after their log-prob, the commonest mistake, gives 4e-4 and more.
EXACT_GAP, CLOSE_GAP = 0.0, 1e-4


@dataclass
class Clock:
    """Seconds by phase."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds[phase] += time.perf_counter() - started


@dataclass
class Sampled:
    """This process's rollout, the micro-batch its log-probs were computed with, and of all processes: how many samples there
    are, and whether there is nothing to learn from them."""

    rollout: Rollout
    micro_batch: int
    total: int
    flat: bool = False

    @property
    def plan(self) -> Plan:
        return self.rollout.plan


class Trainer:
    """Runs a rule on a policy.

    Args:
        draw: update -> the prompts of that update.
        rewards, weights: what is maximised.
        optimizer: over the policy's parameters; one step per `Plan.updates` entry.
        micro_batch: samples whose graph is held at once; halved for good where memory does not suffice.
        term_norms: also return the gradient norm of every term.
        world: the processes that share the work; each samples its own micro-batches.
        max_invalid: share of an update's samples that may be without a score.
        notify: told what a user should know.
    """

    def __init__(
        self,
        rule: UpdateRule,
        policy: TrainablePolicy,
        rewards: dict[str, Reward],
        weights: dict[str, float],
        optimizer: torch.optim.Optimizer,
        draw: Callable[[int], Prompts],
        *,
        micro_batch: int,
        max_grad_norm: float = 1.0,
        seed: int = 0,
        term_norms: bool = False,
        world: World = ALONE,
        max_invalid: float = 1.0,
        notify: Callable[[str], None] = print,
    ) -> None:
        self.rule, self.policy, self.optimizer, self.draw = rule, policy, optimizer, draw
        self.rewards, self.weights = rewards, weights
        self.micro_batch, self.max_grad_norm, self.seed = micro_batch, max_grad_norm, seed
        self.notify, self.term_norms = notify, term_norms or rule.needs.term_norms
        self.world, self.dealt = world, micro_batch
        self.max_invalid, self._background = max_invalid, Background()
        self.nonfinite_in_a_row = 0
        self.judged: tuple[Prompts, Scores] | None = (
            None  # the last update's samples, of all processes, if they were scored
        )
        self._proved: set[str] = set()
        policy.add_shadows(rule.needs.shadows)

    def update(self, index: int) -> Metrics:
        """Update number `index` (0 is the first); returns what there is to log.

        Raises:
            Fault: if sampling and training disagree, or a reward fails.
        """
        clock = Clock(next(iter(self.policy.parameters.values())).device)
        started, forward, backward = time.perf_counter(), self.policy.rows_forward, self.policy.rows_backward
        sampled, credit, metrics = self._sample(index, clock)
        if sampled.flat:
            metrics["skipped_flat"] = 1.0
        else:
            with clock("train"):
                metrics |= self._train(sampled, credit, index)
        self.world.check_equal(self.policy.parameters, f"update {index + 1}")
        self.policy.follow(self.rule.needs.shadows)
        if hasattr(self.rule, "after_update"):
            self.rule.after_update(metrics)
        metrics |= {f"seconds/{phase}": value for phase, value in clock.seconds.items()}
        metrics["seconds/total"] = time.perf_counter() - started
        rows = self.world.gather((self.policy.rows_forward - forward, self.policy.rows_backward - backward))
        metrics["nfe"], metrics["nfe_backward"] = (float(sum(column)) for column in zip(*rows, strict=True))
        return metrics

    def gradient(self, index: int) -> Metrics:
        """The gradient of update `index`'s first optimiser step, left in the parameters' `grad`; nothing else moves."""
        sampled, credit, metrics = self._sample(index, Clock(next(iter(self.policy.parameters.values())).device))
        where = f"update {index + 1}"
        return metrics | self._gradient(sampled.plan.updates[0], sampled, credit, first=True, where=where)

    def _sample(self, index: int, clock: Clock) -> tuple[Sampled, Credit | None, Metrics]:
        """Plan, sample, score and credit."""
        prompts = self.draw(index)
        plan = self.rule.plan(self.policy.schedule, index, numpy_generator(self.seed, 15, index))
        rows = self.world.rows(len(prompts), self.dealt)
        whole = plan.stop == self.policy.schedule.steps

        def own() -> tuple[Sampled, Scores | None]:
            sampler = self.policy.shadow(plan.sampled_by) if plan.sampled_by else nullcontext()
            with sampler:
                rollout, scores = self.fitting(lambda: self._scored(prompts.select(rows), plan, whole, clock))
            return Sampled(rollout, self.policy.micro_batch, len(prompts)), scores

        self.judged = None
        sampled, part = self.world.together(own)
        if part is None:
            return sampled, None, {}
        tree = Tree.grow(len(prompts), plan.branch)
        scores = joined_scores(self.world.gather((rows, part)), tree)
        self.judged = prompts.select(tree.leaf_root), scores
        if 1 - scores.valid.mean() > self.max_invalid or not scores.valid.any():
            raise Unscored(f"update {index + 1}: samples without a score, {unscored(scores.by_name, self.rewards)}")
        credit = self.rule.credit(tree, scores, prompts)
        # Terms that go through the reward learn without credit.
        if credit is not None and not plan.pathwise and not plan.perturbed:
            sampled.flat = not any(np.any(edges) for edges in credit)
        return sampled, credit and select_credit(credit, tree, rows), describe(scores, prompts.group[tree.leaf_root])

    def _scored(self, prompts: Prompts, plan: Plan, whole: bool, clock: Clock) -> tuple[Rollout, Scores | None]:
        """Sample and, if sampling goes to the end, score: rewards in the background work while the next micro-batch is sampled."""
        begun: list[Callable[[], Scores]] = []
        each = functools.partial(self._begin, begun, clock) if whole else None
        before = dict(clock.seconds)
        with clock("sample"):
            rollout = self.policy.rollout(prompts, plan, each)
        clock.seconds["sample"] -= sum(clock.seconds[p] - before.get(p, 0.0) for p in ("decode", "reward"))
        return rollout, self._joined(rollout, begun, clock) if whole else None

    def score(self, rollout: Rollout, clock: Clock) -> Scores:
        """Decode and score the leaves of a rollout, a micro-batch at a time."""
        begun: list[Callable[[], Scores]] = []
        for rows in chunks(len(rollout.prompts), self.micro_batch):
            self._begin(begun, clock, rollout.select(rows))
        return self._joined(rollout, begun, clock)

    def _begin(self, begun: list[Callable[[], Scores]], clock: Clock, part: Rollout) -> None:
        """Decode a micro-batch and begin to score it."""
        with clock("decode"), torch.no_grad():
            media = check_media(self.policy.decode(part, part.x[-1]))
        with clock("reward"):
            begun.append(begin(self.rewards, self.weights, media, part.at(-1), self._background))

    def _joined(self, rollout: Rollout, begun: list[Callable[[], Scores]], clock: Clock) -> Scores:
        """Wait for the scores of a rollout's micro-batches."""
        with clock("reward"):
            parts = [answer() for answer in begun]
        steps = range(rollout.plan.stop) if self.rule.needs.log_probs else ()
        return Scores(
            {name: np.concatenate([part.by_name[name] for part in parts]) for name in self.rewards},
            np.concatenate([part.total for part in parts]),
            np.concatenate([part.valid for part in parts]),
            self.weights,
            [_edges(rollout, step) for step in steps] or None,
        )

    def fitting(self, work: Callable[[], T]) -> T:
        """Do some work; where memory does not suffice, halve the micro-batch and do it again.

        Raises:
            Fault: if one sample alone is too much.
        """
        while True:
            try:
                return work()
            except Exception as error:
                if not out_of_memory(error):
                    raise
                problem = one_line(error)
            # After the handler, which would keep the failed attempt's tensors alive.
            self.optimizer.zero_grad(set_to_none=True)
            release()
            if self.micro_batch == 1:
                raise Fault(
                    f"out of memory with one sample at a time ({problem}); try optimizer.gradient_checkpointing"
                )
            self.micro_batch = self.policy.micro_batch = max(1, min(self.micro_batch, self.policy.micro_batch) // 2)
            self.notify(f"out of memory ({problem}): going on with optimizer.micro_batch {self.micro_batch}")

    def _train(self, sampled: Sampled, credit: Credit | None, index: int) -> Metrics:
        """The optimiser steps of one update; metrics are averaged over them."""
        sums: dict[str, list[float]] = defaultdict(list)
        for number, terms in enumerate(sampled.plan.updates):
            first, where = number == 0, f"update {index + 1}"
            work = functools.partial(self._gradient, terms, sampled, credit, first=first, where=where)
            values = self.world.together(functools.partial(self.fitting, work))
            values = self.world.average(values, len(sampled.rollout.prompts) / sampled.total)
            norm = self._step()
            for name, value in {**values, **norm}.items():
                sums[name].append(value)
        return {name: float(np.mean(values)) for name, values in sums.items()}

    def _gradient(
        self, terms: tuple[Term, ...], sampled: Sampled, credit: Credit | None, *, first: bool, where: str
    ) -> Metrics:
        """The gradient of one optimiser step, from zero."""
        self.optimizer.zero_grad(set_to_none=True)
        # Later steps keep the old log-probs: the parameters they belong to are gone, and only rounding differs.
        stale = any(old is not None for old in sampled.rollout.log_prob)
        if first and stale and sampled.micro_batch != self.policy.micro_batch:
            self.notify(f"{where}: old log-probabilities are computed again, for the smaller micro-batch")
            sampled.rollout = self.policy.recomputed(sampled.rollout)
            sampled.micro_batch = self.policy.micro_batch
        return self.accumulate(terms, sampled.rollout, credit, first=first, where=where, total=sampled.total)

    def accumulate(
        self,
        terms: tuple[Term, ...],
        rollout: Rollout,
        credit: Credit | None,
        *,
        first: bool,
        where: str = "",
        total: int | None = None,
    ) -> Metrics:
        """Add the gradient of a sum of terms to the parameters, freeing each term's graph before the next.

        A part of n of N samples weighs n / N, so the cut into micro-batches and processes does not change the gradient.
        total: N, the rollout's if it is all there is.
        """
        total = total or len(rollout.prompts)
        sums: dict[str, float] = defaultdict(float)
        weights: dict[str, float] = defaultdict(float)
        for rows in chunks(len(rollout.prompts), self.micro_batch):
            part = rollout.select(rows)
            part_credit = None if credit is None else select_credit(credit, rollout.tree, rows)
            share = len(rows) / total
            for term in terms:
                seen: dict[str, Tensor] = {}
                reward = self._bound_reward(part, seen)
                loss = self.rule.loss(term, self.policy, part, part_credit, reward)
                if first and loss.gap is not None:
                    self._check_gap(float(loss.gap), where, term)
                norm = self._backward(term, loss.value, share)
                logged: dict[str, Tensor | float] = {**seen, **loss.metrics, **norm}
                for name, value in logged.items():
                    sums[name] += share * float(value)
                    weights[name] += share
        return {name: value / weights[name] for name, value in sums.items()}

    def _backward(self, term: Term, value: Tensor, share: float) -> Metrics:
        """Add a term's gradient; the norm of the part's own, unweighted, where it is asked for."""
        if not self.term_norms:
            (value * (term.weight * share)).backward()
            return {}
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
        norm = torch.stack([g.norm() for g in own if g is not None]).norm()
        return {f"term_norm/{term.start}-{term.stop}": float(norm)}

    def _check_gap(self, gap: float, where: str, term: Term) -> None:
        allowed = EXACT_GAP if self.policy.exact else CLOSE_GAP
        if not gap <= allowed:
            raise Fault(
                f"{where}, step {term.start}: the replay differs from the rollout by {gap:.3g} "
                f"(allowed {allowed:g}): sampling and training do not see the same latents or network"
            )

    def _bound_reward(self, part: Rollout, seen: dict[str, Tensor]) -> RewardFunction:
        """The weighted sum of rewards with its gradient; means go to `seen`, for rules that sample no further than a replay."""
        prompts = part.prompts.select(part.tree.leaf_root)

        def reward(media: Media) -> Tensor:
            total = media.pixels.new_zeros(len(prompts))
            for name, function in self.rewards.items():
                value = function(check_media(media), prompts)
                if torch.is_grad_enabled() and not self._reaches(name, value, media):
                    raise Fault(f"reward {name}: has no gradient to the pictures")
                value = torch.as_tensor(value, dtype=total.dtype, device=total.device)
                if not value.isfinite().any():
                    raise Fault(f"reward {name}: no sample got a score, none is finite")
                total = total + self.weights[name] * value
                seen[f"reward/{name}"] = value.detach().mean()
            seen["reward/total"] = total.detach().mean()
            return total

        return reward

    def _reaches(self, name: str, value: Tensor | Sequence[float], media: Media) -> bool:
        """Whether a reward's value depends on the pixels, found out at its first use."""
        if not isinstance(value, Tensor) or not value.requires_grad:
            return False
        if name not in self._proved and media.pixels.requires_grad:
            (slope,) = torch.autograd.grad(value.sum(), media.pixels, retain_graph=True, allow_unused=True)
            if slope is None:
                return False
            self._proved.add(name)
        return True

    def _step(self) -> Metrics:
        """Clip and step, unless the gradient is not finite: then skip and count."""
        parameters = list(self.policy.parameters.values())
        for parameter in parameters:
            if parameter.grad is None:  # a part of the model that no term touched
                parameter.grad = torch.zeros_like(parameter)
        self.world.add_up([parameter.grad for parameter in parameters if parameter.grad is not None])
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm))
        if math.isfinite(norm):
            self.optimizer.step()
            self.nonfinite_in_a_row = 0
            return {"grad_norm": norm, "skipped_nonfinite": 0.0}
        self.nonfinite_in_a_row += 1
        return {"skipped_nonfinite": 1.0}


def select_credit(credit: Credit, tree: Tree, rows: Rows) -> Credit:
    """The credit of the edges that grow from some roots."""
    kept = tree.nodes(rows)
    return [edges[kept[t + 1]] for t, edges in enumerate(credit)]


def joined_scores(found: list[tuple[list[int], Scores]], tree: Tree) -> Scores:
    """The scores of all samples from those of every process and the rows they are of."""
    if len(found) == 1:
        return found[0][1]
    order = [row for rows, _ in found for row in rows]
    places = tree.nodes(order)  # of what the processes found, level by level, one after another

    def put(level: int, values: Sequence[np.ndarray]) -> np.ndarray:
        joined = np.concatenate(values)
        whole = np.empty_like(joined)
        whole[places[level]] = joined
        return whole

    parts = [scores for _, scores in found]
    steps = range(len(parts[0].log_prob or ()))
    return Scores(
        {name: put(-1, [part.by_name[name] for part in parts]) for name in parts[0].by_name},
        put(-1, [part.total for part in parts]),
        put(-1, [part.valid for part in parts]),
        parts[0].weights,
        [put(step + 1, [(part.log_prob or [])[step] for part in parts]) for step in steps] or None,
    )


def _edges(rollout: Rollout, step: int) -> Floats:
    """Log-probs of a step's edges (N_{t+1},), 0 where it is deterministic."""
    found = rollout.log_prob[step]
    return np.zeros(len(rollout.tree.parent[step])) if found is None else found.double().cpu().numpy()


def describe(scores: Scores, group: Integers) -> Metrics:
    """Mean of every reward over valid samples, their share, and the share of groups (of the samples' ids) without spread."""
    valid = scores.valid
    metrics = {"reward/valid": float(valid.mean()), "reward/total": float(scores.total[valid].mean())}
    metrics |= {f"reward/{name}": float(values[valid].mean()) for name, values in scores.by_name.items()}
    missing = {name: float((~np.isfinite(values)).sum()) for name, values in scores.by_name.items()}
    metrics |= {f"invalid/{name}": count for name, count in missing.items() if count}
    spread = [np.ptp(scores.total[(group == g) & valid]) if ((group == g) & valid).any() else 0.0 for g in set(group)]
    metrics["groups_flat"] = float(np.mean(np.asarray(spread) == 0))
    return metrics
