"""What an update starts from, in all processes, and what they find out together about it before a gradient and after."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np

from diffalign.errors import Unscored
from diffalign.protocols import TrainablePolicy
from diffalign.rewards.scorer import Tally
from diffalign.runtime.distributed import World
from diffalign.runtime.memory import fitting
from diffalign.training.backward import Backward, Share
from diffalign.training.scoring import Appearance, Clock, Sampling, joined, joined_scores
from diffalign.types import Credit, Floats, Integers, Plan, Prompts, Rollout, Scores, Tree, Update


@dataclass
class Drawn:
    """What one plan drew: of all prompts of an update those of `every` process and this one's `rows`, which the rollout is of.

    scores: of every process's, where the plan samples to the end; looks: what this process's samples look like.
    """

    rollout: Rollout
    every: Integers
    rows: Integers
    scores: Scores | None = None
    looks: Appearance | None = None

    @property
    def tree(self) -> Tree:
        """Of all processes' samples."""
        return Tree.grow(len(self.every), self.rollout.plan.branch)

    @property
    def places(self) -> Integers:
        """(n,) of this process's rows among every process's."""
        return np.searchsorted(self.every, self.rows)


@dataclass
class Sampled:
    """What an update starts from: what each of its plans drew, mostly one, the credit of all samples, and what is known so far.

    uneven: groups may differ in size, and weigh the same; a micro-batch is then of one group.
    """

    parts: list[Drawn]
    prompts: Prompts
    credit: Credit | None
    update: Update
    uneven: bool = False

    @property
    def rollout(self) -> Rollout:
        """The only one."""
        (part,) = self.parts
        return part.rollout

    @property
    def updates(self) -> int:
        """How many optimiser steps it is for."""
        return len(self.parts[0].rollout.plan.updates)

    def totals(self, part: Drawn) -> Integers:
        """(n,) of each of a part's rows here how many there would be if all groups were like its own: a row weighs one over it."""
        group = self.prompts.group
        if not self.uneven:
            return np.full(len(part.rows), len(group))
        names, counts = np.unique(group, return_counts=True)
        return len(names) * counts[np.searchsorted(names, group[part.rows])]

    @property
    def share(self) -> float:
        """What this process's rows weigh of all."""
        if self.uneven:
            return float(sum((1 / self.totals(part)).sum() for part in self.parts))
        return sum(len(part.rows) for part in self.parts) / len(self.prompts)

    def credited(self, rows: dict[str, Floats], part: Drawn) -> Credit | None:
        """A part's credit here, with further numbers (N,) about the leaves of all that is drawn by its plan."""
        if self.credit is None:
            return None
        whole = self.credit.select(self.tree, part.every)
        whole = replace(whole, rows={**whole.rows, **rows})
        return whole.select(part.tree, part.places)

    @property
    def tree(self) -> Tree:
        """Of all processes' samples."""
        return Tree.grow(len(self.prompts), self.parts[0].rollout.plan.branch)


def drawn(
    sampling: Sampling,
    prompts: Prompts,
    plan: Plan,
    clock: Clock,
    world: World,
    dealt: int,
    notify: Callable[[str], None],
    cached: bool = False,
    every: Integers | None = None,
) -> Drawn:
    """This process's share, dealt so many at a time, of some of the prompts, None: of all; scores where the plan samples to the end.

    cached: with a cache of features, where the policy has one.
    """
    every = np.arange(len(prompts)) if every is None else every
    # A few prompts are dealt in smaller parts: each process has some of them.
    rows = every[world.rows(len(every), max(1, min(dealt, len(every) // world.size)))]
    policy = sampling.policy

    def own() -> tuple[Rollout, Scores | None]:
        with (
            policy.shadow(plan.sampled_by) if plan.sampled_by else nullcontext(),
            policy.cached() if cached else nullcontext(),
        ):
            return fitting(policy, functools.partial(sampling.run, prompts.select(rows), plan, clock), notify)

    rollout, scores = world.together(own)
    found = Drawn(rollout, every, rows)
    if scores is not None:
        found.scores = joined_scores(world.gather((found.places.tolist(), scores)), found.tree)
        found.looks = sampling.appearance()
    return found


def recompute(parts: Sequence[Drawn], policy: TrainablePolicy, notify: Callable[[str], None]) -> None:
    """Old log-probs, before a first optimiser step, where micro-batches became smaller. Later steps keep theirs: the parameters that they
    belong to are gone, and only rounding differs."""
    size = policy.micro_batch
    due = [p for p in parts if p.rollout.micro_batch != size and any(old is not None for old in p.rollout.log_prob)]
    if due:
        notify("old log-probabilities are computed again, for the smaller micro-batch")
    for part in due:
        part.rollout = policy.recomputed(part.rollout)


def settled(
    sampled: Sampled, number: int, backward: Backward, world: World, notify: Callable[[str], None]
) -> list[Share]:
    """What this process does in optimiser step `number`, with what the rule finds out about whole groups beforehand."""
    return [_settled(sampled, part, number, backward, world, notify) for part in sampled.parts]


def _settled(
    sampled: Sampled, part: Drawn, number: int, backward: Backward, world: World, notify: Callable[[str], None]
) -> Share:
    terms, totals = part.rollout.plan.updates[number], sampled.totals(part)
    if not backward.rule.needs.looks:
        return Share(terms, part.rollout, [sampled.credited({}, part)] * len(terms), totals)
    work = functools.partial(fitting, backward.policy, functools.partial(backward.look, terms, part.rollout), notify)
    by_process = world.gather((part.places.tolist(), world.together(work)))
    assert sampled.credit is not None
    tree = part.tree
    looked = [
        {
            name: joined([(rows, own[place][name]) for rows, own in by_process if rows], tree)
            for name in by_process[0][1][place]
        }
        for place in range(len(terms))
    ]
    credit = sampled.credit.select(sampled.tree, part.every)
    rows = backward.rule.settle(terms, looked, credit, sampled.prompts.group[part.every][tree.leaf_root])
    return Share(terms, part.rollout, [sampled.credited(own, part) for own in rows], totals)


def all_scores(parts: Sequence[Drawn], tree: Tree) -> Scores | None:
    """Of all samples of an update, from what each of its plans drew; None where they are not sampled to the end."""
    scored = [(part.every.tolist(), part.scores) for part in parts if part.scores is not None]
    return joined_scores(scored, tree) if len(scored) == len(parts) else None


def tallied(world: World, tally: Tally, max_invalid: float, where: str) -> Tally:
    """What all processes asked rewards about in the optimiser step just taken a gradient of.

    Raises:
        Unscored: if too many samples have no score.
    """
    whole = Tally()
    for part in world.gather(tally):
        whole = whole.joined(part)
    if whole.unscored and (whole.unscored > max_invalid * whole.asked or whole.unscored == whole.asked):
        lines = [f"{name}: {count} of {whole.asked}" for name, count in whole.missing.items()]
        raise Unscored(f"{where}: samples without a score, {', '.join(lines)}")
    return whole
