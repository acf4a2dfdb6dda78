"""Samples of the bare base model, drawn once, on which every optimiser step also learns the loss that the network was made with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from diffalign.protocols import BASE
from diffalign.rules import Matching
from diffalign.runtime import keys
from diffalign.runtime.distributed import World
from diffalign.runtime.memory import fitting
from diffalign.runtime.randomness import Purpose, key, numpy_generator
from diffalign.training.backward import Backward, Logged, Share
from diffalign.training.scoring import joined
from diffalign.types import Plan, Prompts, Rollout, Term, Tree, rows_by_group


@dataclass
class Anchor:
    """What draws a run back to its base model's own samples.

    They follow from the base model, the prompts and their seeds alone: drawn again, as a resumed run does, they are the same.

    backward: of a matching loss; prompts: update -> its prompts, which are sampled here too; world: processes that share the work; seed:
    of the samples' noise, and of which of them a step takes.
    """

    backward: Backward
    prompts: Callable[[int], Prompts]
    world: World
    seed: int
    notify: Callable[[str], None]
    _samples: Rollout | None = None  # in host memory
    _logged: Logged = field(default_factory=dict)  # of the last step's part here
    _share: float = 0.0  # that it has of the step's samples

    @property
    def rule(self) -> Matching:
        """Whose loss it is."""
        assert isinstance(self.backward.rule, Matching)
        return self.backward.rule

    def draw(self) -> None:
        """Draw the samples if that was not done, each process its share, and give all to all."""
        if self._samples is not None:
            return
        policy, prompts = self.backward.policy, spread(self.prompts, self.rule.data.count, self.seed)
        count, steps = len(prompts), policy.schedule.steps
        rows = self.world.rows(
            count, max(1, min(policy.micro_batch, count // self.world.size))
        )  # each process has some
        # A term that reads the last latents alone: others are not kept.
        plan = replace(Plan.deterministic(steps), updates=((Term(steps, steps, "forward"),),))

        drawn = 0

        def said(part: Rollout) -> None:
            nonlocal drawn
            drawn += len(part.prompts)
            self.backward.progress("drawing the base model's samples", drawn, len(rows))

        def own() -> Rollout:
            nonlocal drawn
            drawn = 0
            with policy.weights(BASE):
                return policy.rollout(prompts.select(rows), plan, said)

        part = self.world.together(lambda: fitting(policy, own, self.notify))
        tree, last = Tree.grow(count, plan.branch), part.x[-1].cpu()
        own_x0 = (last.float() if last.dtype == torch.bfloat16 else last).numpy()  # numpy has no bfloat16
        x0 = last.new_tensor(joined(self.world.gather((rows, own_x0)), tree))
        x = [*(last.new_empty(count, 0) for _ in range(steps)), x0]
        nothing: list[Tensor | None] = [None] * steps
        self._samples = replace(part, prompts=prompts, tree=tree, x=x, eps=nothing, mean=nothing, log_prob=nothing)

    def accumulate(self, update: int, step: int) -> None:
        """Add a gradient to the parameters: of this process's part of what optimiser step `step` of an update takes of the samples."""
        assert self._samples is not None, "nothing was drawn"
        policy, count = self.backward.policy, self.rule.data.rows
        rng = numpy_generator(self.seed, Purpose.ANCHOR, update, step)
        picked = rng.choice(self.rule.data.count, count, replace=False)
        plan = self.rule.plan(policy.schedule, update, rng)
        mine = picked[self.world.rows(count, policy.micro_batch)]
        self._logged, self._share = {}, len(mine) / count
        if not len(mine):
            return
        device = next(iter(policy.parameters.values())).device
        part = self._samples.select(mine)
        part = replace(part, plan=plan, x=[x.to(device) for x in part.x])
        (terms,) = plan.updates
        totals = np.full(len(mine), count)
        share = Share(terms, part, [None] * len(terms), totals)
        self._logged = self.backward.accumulate([share], first=False)

    def noted(self) -> Logged:
        """The last step's loss on its samples, of all processes, and what the base model's is there."""
        own: Logged = {name: value for name, value in self._logged.items() if name in (keys.DATA, keys.DATA_BASE)}
        return self.world.average(own, self._share)


def spread(prompts: Callable[[int], Prompts], count: int, seed: int) -> Prompts:
    """One sample each of the prompts of the first updates, `count` in all, with seeds of their own."""
    found: list[Prompts] = []
    have = 0
    while have < count:
        drawn = prompts(len(found))
        found.append(drawn.select([rows[0] for rows in rows_by_group(drawn.group)]))
        have += len(found[-1])
    number = np.arange(count)
    seeds = np.array([key(seed, Purpose.ANCHOR, k) for k in range(count)])
    texts = [text for part in found for text in part.text]
    metadata = [each for part in found for each in part.metadata]
    stages = [each for part in found for each in part.stages]
    return Prompts(texts[:count], number, seeds, seeds, metadata[:count], stages[:count])
