"""What an update starts from, in all processes, and what they find out together about it before a gradient and after."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np

from diffalign.errors import Unscored
from diffalign.rewards.scorer import Tally
from diffalign.runtime.distributed import World
from diffalign.runtime.memory import fitting
from diffalign.training.backward import Backward
from diffalign.training.scoring import Clock, Sampling, joined, joined_scores
from diffalign.types import Credit, Floats, Integers, Plan, Prompts, Rollout, Scores, Term, Tree, Update


@dataclass
class Sampled:
    """What an update starts from: this process's rollout, which rows it has of all prompts, the credit of all, and what is known so far.

    uneven: groups may differ in size, and weigh the same; a micro-batch is then of one group.
    """

    rollout: Rollout
    rows: list[int]
    prompts: Prompts
    credit: Credit | None
    update: Update
    uneven: bool = False

    @property
    def totals(self) -> Integers:
        """(n,) of each of this process's rows how many there would be if all groups were like its own: a row weighs one over it."""
        group = self.prompts.group
        if not self.uneven:
            return np.full(len(self.rows), len(group))
        names, counts = np.unique(group, return_counts=True)
        return len(names) * counts[np.searchsorted(names, group[self.rows])]

    @property
    def share(self) -> float:
        """What this process's rows weigh of all."""
        return float((1 / self.totals).sum()) if self.uneven else len(self.rows) / len(self.prompts)

    def own(self, rows: dict[str, Floats] | None = None) -> Credit | None:
        """This process's part of the credit, with further numbers about all leaves."""
        if self.credit is None:
            return None
        whole = replace(self.credit, rows={**self.credit.rows, **(rows or {})})
        return whole.select(self.tree, self.rows)

    @property
    def tree(self) -> Tree:
        """Of all processes' samples."""
        return Tree.grow(len(self.prompts), self.rollout.plan.branch)


def drawn(
    sampling: Sampling,
    prompts: Prompts,
    plan: Plan,
    clock: Clock,
    world: World,
    dealt: int,
    notify: Callable[[str], None],
    cached: bool = False,
) -> tuple[list[int], Rollout, Scores | None]:
    """This process's rows of some prompts, so many at a time, their rollout, and the scores of all, where the plan samples to the end.

    cached: with a cache of features, where the policy has one.
    """
    rows, policy = world.rows(len(prompts), dealt), sampling.policy

    def own() -> tuple[Rollout, Scores | None]:
        with (
            policy.shadow(plan.sampled_by) if plan.sampled_by else nullcontext(),
            policy.cached() if cached else nullcontext(),
        ):
            return fitting(policy, functools.partial(sampling.run, prompts.select(rows), plan, clock), notify)

    rollout, part = world.together(own)
    tree = Tree.grow(len(prompts), plan.branch)
    return rows, rollout, part and joined_scores(world.gather((rows, part)), tree)


def settled(
    terms: tuple[Term, ...], sampled: Sampled, backward: Backward, world: World, notify: Callable[[str], None]
) -> list[Credit | None]:
    """This process's credit for each term of an optimiser step, with what the rule finds out about whole groups beforehand."""
    if not backward.rule.needs.looks:
        return [sampled.own()] * len(terms)
    work = functools.partial(fitting, backward.policy, functools.partial(backward.look, terms, sampled.rollout), notify)
    by_process = world.gather((sampled.rows, world.together(work)))
    assert sampled.credit is not None
    tree = sampled.tree
    looked = [
        {
            name: joined([(rows, own[place][name]) for rows, own in by_process if rows], tree)
            for name in by_process[0][1][place]
        }
        for place in range(len(terms))
    ]
    rows = backward.rule.settle(terms, looked, sampled.credit, sampled.prompts.group[tree.leaf_root])
    return [sampled.own(own) for own in rows]


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
