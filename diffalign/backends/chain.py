"""A sampler chain with replay: what every backend shares.

A backend says how to run the network at some steps (`drive`), how to start and how to decode; rollouts, trees, replays
and single transitions follow from that here. Sampling never builds a graph: a rule gets gradient by replaying a span from the
stored latent with the stored noise, which gives the same values and a graph.
"""

from __future__ import annotations

import bisect
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from diffalign.backends.guiding import GuidedSteps
from diffalign.backends.parameters import Trained
from diffalign.backends.walk import OnStep, Walk, wide
from diffalign.ops import gaussian
from diffalign.processes import Levels, Process, Table
from diffalign.protocols import Replay, Transition
from diffalign.runtime.randomness import SHARED, key, normal
from diffalign.types import Media, Plan, Prompts, Rollout, Schedule, Tree, chunks


class ChainPolicy(Trained, ABC):
    """Policy over a chain of T steps; see `diffalign.types.Policy`.

    Args:
        timestep, levels: the sampler's (T,) timesteps and T+1 noise levels.
        process, noise_level: how a step follows from a prediction.
        micro_batch: roots per forward pass. Rollout and replay use the same batch shape, so first-pass ratios are exactly 1.
        stretches: first steps of the stretches that prompts with stages tell apart.
        guidance_steps: see `GuidedSteps`; scale: timesteps of a time of 1.
    """

    def __init__(
        self,
        timestep: np.ndarray,
        levels: Levels,
        process: Process,
        noise_level: float,
        micro_batch: int,
        stretches: Sequence[int] = (0,),
        guidance_steps: Sequence[int] | None = None,
        scale: float = 1000.0,
    ) -> None:
        super().__init__()
        self.levels = levels
        self.guided = GuidedSteps(guidance_steps, timestep / scale)
        self.stretches = tuple(stretches)
        self._clean = levels.parts()[:2]
        self.noisy: Table = process.table(levels, noise_level)
        self.quiet: Table = process.table(levels, 0.0)
        gain = np.abs(self.noisy.prediction)
        self.schedule = Schedule(timestep, levels.alpha, levels.sigma, self.noisy.std, gain, levels.prediction)
        self.micro_batch = micro_batch
        self.adapts = True
        self.rows_forward = self.rows_backward = self.parts_called = self.parts_run = 0

    # -- what a backend provides

    @abstractmethod
    def start(self, prompts: Prompts, seeds: Sequence[int]) -> Tensor:
        """Initial latents (N, D...), row k drawn from seeds[k]."""

    @abstractmethod
    def drive(self, prompts: Prompts, x: Tensor, steps: Sequence[int], on_step: OnStep) -> None:
        """Run the network at rising steps, all with guidance or all without, from latents x, handing every prediction to `on_step`."""

    @abstractmethod
    def predict(self, part: Rollout, x: Tensor, time: Tensor) -> Tensor:
        """The network's prediction at latents x (N, D...) and times (N,) in [0, 1] for the part's leaves, guided as the
        nearest step is."""

    @abstractmethod
    def pixels(self, prompts: Prompts, x: Tensor, whole: bool = True) -> Media:
        """Decode finished latents, with gradient to them. whole: all of a video, whatever rewards are to see of it."""

    # -- what follows from it

    def forget(self) -> bool:
        """Give back what is kept only to be fast; whether there was anything."""
        return False

    @contextmanager
    def cached(self) -> Iterator[None]:
        """Draw rollouts with a cache of features, where the policy has one, for the length of the context."""
        yield

    def guided_throughout(self) -> AbstractContextManager[None]:
        """Guidance on every step for the length of the context."""
        return self.guided.everywhere()

    def count(self, rows: int, again: bool = False) -> None:
        """Backends call this once per network call; `again`: one that only rebuilds a graph."""
        self.rows_forward += rows
        self.rows_backward += rows if torch.is_grad_enabled() and not again else 0

    def table(self, plan: Plan, step: int) -> tuple[float, float, float]:
        """(x, prediction, std) coefficients of a step under a plan."""
        rows = self.noisy if plan.noise[step] else self.quiet
        return float(rows.x[step]), float(rows.prediction[step]), float(rows.std[step])

    @torch.no_grad()
    def rollout(self, prompts: Prompts, plan: Plan, each: Callable[[Rollout], None] | None = None) -> Rollout:
        """Sample every prompt to level `plan.stop`, `micro_batch` roots at a time; `each` sees every micro-batch once it is done."""
        parts = []
        for rows in chunks(len(prompts), self.micro_batch):
            parts.append(self._rollout(prompts.select(rows), plan))
            if each is not None:
                each(parts[-1])
        return concatenate(parts, prompts)

    def _rollout(self, prompts: Prompts, plan: Plan) -> Rollout:
        tree = Tree.grow(len(prompts), plan.branch)
        starts = prompts.group_seed if plan.shared_start else prompts.seed
        x = wide(self.start(prompts, [int(seed) for seed in starts]))
        read, rewalked = plan.levels, plan.rewalked
        kept = x if 0 in read else x.new_empty(len(x), 0)
        record = Rollout(prompts, plan, tree, self.micro_batch, [kept], [], [], [], [])

        def advance(step: int, x: Tensor, prediction: Tensor, mean: Tensor) -> Tensor:
            std, levels = self.table(plan, step)[2], plan.arrival(step) - step
            mean_child = mean[tree.parent[step]]
            if std > 0:
                eps = self._noise(prompts, plan, step, like=mean)
                x_next = mean_child + std * eps
                # On exactly the tensor that is stored, or the first ratio is not 1.
                record.log_prob.append(gaussian.log_prob(x_next, mean_child, std, reduce="mean"))
                record.eps.append(eps if step in rewalked else None)
            else:
                x_next = mean_child
                record.log_prob.extend([None] * levels)
                record.eps.extend([None] * levels)
            for _ in range(levels):
                record.x.append(x_next if len(record.x) in read else x_next.new_empty(len(x_next), 0))
                record.mean.append(mean if plan.keep_mean and step in read else None)
                record.std.append(std)
            return x_next

        Walk(self, prompts, tree, plan, advance).run(x, 0, plan.stop)
        return record

    def _noise(self, prompts: Prompts, plan: Plan, step: int, like: Tensor) -> Tensor:
        """Noise (N_{t+1}, D...) a step injects, a function of the roots' seeds, the plan and the step alone.

        Siblings share `plan.correlation` of its variance; each child's marginal is N(0, I).
        """
        seeds = [int(seed) for seed in prompts.seed]
        for children in plan.branch[:step]:
            seeds = child_seeds(seeds, children)
        count = plan.branch[step]
        own = normal(child_seeds(seeds, count), like.shape[1:], step, like=like)
        if count == 1 or plan.correlation == 0:
            return own
        shared = normal(seeds, like.shape[1:], step, SHARED, like=like).repeat_interleave(count, 0)
        # eps = sqrt(c) shared + sqrt(1 - c) own (BranchGRPO, arXiv 2509.06040, with c = 1 / (1 + s^2))
        return plan.correlation**0.5 * shared + (1 - plan.correlation) ** 0.5 * own

    def stretch(self, step: int) -> int:
        """Which stretch of the chain a step belongs to."""
        return bisect.bisect_right(self.stretches, step) - 1

    def transition(self, part: Rollout, step: int) -> Transition:
        """Evaluate one step at the part's stored latents: one network row per node of its level."""
        seen: list[Tensor] = []

        def advance(_: int, x: Tensor, prediction: Tensor, mean: Tensor) -> Tensor:
            seen.extend((prediction, mean))
            return x

        single = Plan(part.plan.stop, part.plan.noise, (), keep_mean=part.plan.keep_mean)
        Walk(self, part.prompts, part.tree, single, advance).run(part.x[step], step, step + 1)
        return Transition(seen[0], seen[1], self.table(part.plan, step)[2])

    def replay(
        self, part: Rollout, start: int, stop: int, steps: Collection[int] | None = None, detached: bool = False
    ) -> Replay:
        """Run steps [start, stop) from the stored latent with the same noise; `stop` may lie beyond where sampling ended.

        steps: where the network's output carries gradient, None: everywhere; elsewhere it is a constant. detached: gradient flows
        along the latents, x' = a x + b f(sg[x]), and not through the network's input (DRTune, arXiv 2405.00760).
        """
        last = [part.x[start], part.x[start]]

        def advance(step: int, x: Tensor, prediction: Tensor, mean: Tensor) -> Tensor:
            if step == stop - 1:
                clean_x, clean_prediction = (float(column[step]) for column in self._clean)
                last[:] = mean, clean_x * x + clean_prediction * prediction
            child, std = mean[part.tree.parent[step]], self.table(part.plan, step)[2]
            if std == 0:
                return child
            stored = part.eps[step] if step < len(part.eps) else None
            return child + std * (self._noise(part.prompts, part.plan, step, like=mean) if stored is None else stored)

        walk = Walk(self, part.prompts, part.tree, part.plan, advance, steps, detached)
        x = walk.run(part.x[start], start, stop)
        std = self.table(part.plan, stop - 1)[2] if stop > start else 0.0
        return Replay(x, last[0], std, last[1])

    @torch.no_grad()
    def recomputed(self, rollout: Rollout) -> Rollout:
        """The rollout with means and log-probs as the present micro-batch gives them: its size changes their last bits."""
        parts = []
        for rows in chunks(len(rollout.prompts), self.micro_batch):
            part = rollout.select(rows)
            mean, log_prob = list(part.mean), list(part.log_prob)
            for step in (k for k, old in enumerate(part.log_prob) if old is not None):
                now = self.transition(part, step)
                child = now.mean[part.tree.parent[step]]
                log_prob[step] = gaussian.log_prob(part.x[step + 1], child, now.std, reduce="mean")
                mean[step] = now.mean if part.plan.keep_mean else None
            parts.append(replace(part, micro_batch=self.micro_batch, mean=mean, log_prob=log_prob))
        return concatenate(parts, rollout.prompts)

    def decode(self, part: Rollout, x: Tensor, whole: bool = False) -> Media:
        """Decode latents of the part's leaves: what rewards are to see in training, or the `whole`."""
        return self.pixels(part.prompts.select(part.tree.leaf_root), x, whole)


def child_seeds(seeds: list[int], children: int) -> list[int]:
    """Noise keys of the next level: a node's only child keeps its key."""
    return seeds if children == 1 else [key(seed, child) for seed in seeds for child in range(children)]


def concatenate(parts: list[Rollout], prompts: Prompts) -> Rollout:
    """One rollout of several, in order; `prompts` are those of all."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]

    def joined(name: str) -> list:
        columns = zip(*(getattr(part, name) for part in parts), strict=True)
        return [None if column[0] is None else torch.cat(column) for column in columns]

    tree = Tree.grow(len(prompts), first.plan.branch)
    return Rollout(
        prompts,
        first.plan,
        tree,
        first.micro_batch,
        joined("x"),
        joined("eps"),
        joined("mean"),
        first.std,
        joined("log_prob"),
    )
