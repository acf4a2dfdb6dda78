"""What an update starts from, in all processes, and what they find out together about it before a gradient and after."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

from diffalign.errors import Unscored
from diffalign.rewards.scorer import Tally
from diffalign.runtime.distributed import World
from diffalign.runtime.memory import fitting
from diffalign.training.backward import Backward
from diffalign.training.scoring import joined
from diffalign.types import Credit, Floats, Prompts, Rollout, Term, Tree, Update


@dataclass
class Sampled:
    """What an update starts from: this process's rollout, which rows it has of all prompts, the credit of all, and what is known so far."""

    rollout: Rollout
    rows: list[int]
    prompts: Prompts
    credit: Credit | None
    update: Update

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
    group, found = sampled.prompts.group[tree.leaf_root], []
    for place in range(len(terms)):
        looked = {
            name: joined([(rows, own[place][name]) for rows, own in by_process if rows], tree)
            for name in by_process[0][1][place]
        }
        found.append(sampled.own(backward.rule.settle(looked, sampled.credit, group)))
    return found


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
