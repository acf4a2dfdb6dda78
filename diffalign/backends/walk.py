"""A walk over a forest of trajectories: which steps are driven together, and what a step's mean is."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from diffalign.processes import Levels, dpm_solver
from diffalign.types import Plan, Prompts, Tree

OnStep = Callable[[int, Tensor, Tensor], Tensor]  # (step, prediction, latent as the network saw it) -> next latent
Advance = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (step, latent, prediction, mean) -> next latents


class Walked(Protocol):
    """What a walk needs of a policy."""

    levels: Levels

    def table(self, plan: Plan, step: int) -> tuple[float, float, float]: ...
    def stretch(self, step: int) -> int: ...
    def shifts(self, step: int) -> bool: ...
    def guided(self, step: int, /) -> bool: ...
    def moved(self, step: int | None) -> AbstractContextManager[None]: ...
    def drive(self, prompts: Prompts, x: Tensor, steps: Sequence[int], on_step: OnStep) -> None: ...


def wide(x: Tensor) -> Tensor:
    """Step algebra is float32 at least, whatever the network's precision."""
    return x if x.dtype == torch.float64 else x.float()


class FirstOrder:
    """The sampler's own step: mean = a x + b prediction."""

    def __init__(self, policy: Walked, plan: Plan) -> None:
        self.policy, self.plan = policy, plan

    def mean(self, step: int, latent: Tensor, prediction: Tensor) -> Tensor:
        """Of the next latent."""
        coefficient, gain, _ = self.policy.table(self.plan, step)
        return coefficient * latent + gain * prediction


class SecondOrder(FirstOrder):
    """The sampler's own step, and from the plan's first solver step on DPM-Solver++ (2M), which remembers the clean sample before."""

    def __init__(self, policy: Walked, plan: Plan, start: int) -> None:
        super().__init__(policy, plan)
        if start > plan.solver[0]:
            raise ValueError(
                f"step {start} follows from steps of a solver before it, the first of them {plan.solver[0]}"
            )
        self.jumps = dpm_solver.jumps(policy.levels, plan.solver)
        self.past: Tensor | None = None

    def mean(self, step: int, latent: Tensor, prediction: Tensor) -> Tensor:
        if step not in self.plan.solver:
            return super().mean(step, latent, prediction)
        k, jumps = self.plan.solver.index(step), self.jumps
        mean = float(jumps.x[k]) * latent + float(jumps.prediction[k]) * prediction
        mean = mean if self.past is None else mean + float(jumps.past[k]) * self.past
        self.past = float(jumps.clean_x[k]) * latent + float(jumps.clean_prediction[k]) * prediction
        return mean


@dataclass
class Walk:
    """Steps over a forest under a plan: one drive per stretch of equal texts, guidance and parameters without branching.

    advance: what becomes of a step; steps: where the network's output carries gradient, None: everywhere; detached: its input carries none.
    """

    policy: Walked
    prompts: Prompts
    tree: Tree
    plan: Plan
    advance: Advance
    steps: Collection[int] | None = None
    detached: bool = False

    def run(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Walk steps [start, stop) from latents x; returns the latents after them.

        Raises:
            ValueError: for a walk that starts after the plan's solver did, whose memory it would lack.
        """
        self._latent, self._graph = x, torch.is_grad_enabled()
        self._sampler = (
            SecondOrder(self.policy, self.plan, start) if self.plan.solver else FirstOrder(self.policy, self.plan)
        )
        ahead = [k for k in range(start, stop) if not self.plan.leaves_out(k)]
        while ahead:
            stretch, shifted, learns, _ = now = self._circumstances(ahead[0])
            pairs = itertools.pairwise(ahead)
            ends = (
                i + 1 for i, (k, to) in enumerate(pairs) if self.plan.branch[k] > 1 or self._circumstances(to) != now
            )
            end = next(ends, len(ahead))
            texts = self.prompts.select(self.tree.root[ahead[0]]).on_stretch(stretch)
            with self.policy.moved(shifted), torch.set_grad_enabled(learns):
                self.policy.drive(texts, self._shown(), ahead[:end], self._on_step)
            ahead = ahead[end:]
        return self._latent

    def _circumstances(self, step: int) -> tuple[int, int | None, bool, bool]:
        """What has to be equal for steps to be driven together: the texts, the noise on the parameters, whether there is gradient, and
        whether there is guidance."""
        shifted = step if self.policy.shifts(step) else None
        learns = self._graph and (self.steps is None or step in self.steps)
        return self.policy.stretch(step), shifted, learns, self.policy.guided(step)

    def _shown(self) -> Tensor:
        """The latents as the network gets them."""
        return self._latent.detach() if self.detached else self._latent

    def _on_step(self, step: int, prediction: Tensor, seen: Tensor) -> Tensor:
        prediction = wide(prediction)
        with torch.set_grad_enabled(self._graph):
            mean = self._sampler.mean(step, self._latent, prediction)  # on our own wide copy of the latent
            rows = len(self._latent)
            self._latent = self.advance(step, self._latent, prediction, mean)
        return self._shown().to(seen.dtype) if len(self._latent) == rows else seen
