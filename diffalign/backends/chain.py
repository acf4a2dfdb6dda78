"""A sampler chain with replay: what every backend shares.

A backend says how to run the network at some steps (`drive`), how to start and how to decode; rollouts, trees, replays
and single transitions follow from that here. Sampling never builds a graph: a rule gets gradient by replaying a span from the
stored latent with the stored noise, which gives the same values and a graph.
"""

from __future__ import annotations

import bisect
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from diffalign.ops import gaussian
from diffalign.processes import Levels, Process, Table, dpm_solver
from diffalign.protocols import Replay, Transition
from diffalign.runtime.randomness import SHARED, Purpose, key, normal
from diffalign.types import Media, Plan, Prompts, Rollout, Schedule, Tree, chunks

OnStep = Callable[[int, Tensor, Tensor], Tensor]  # (step, prediction, latent as the network saw it) -> next latent
Advance = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (step, latent, prediction, mean) -> next latents
NO_SHIFT: tuple[int, frozenset[int], float] = (0, frozenset(), 0.0)  # draw, steps, scale


def wide(x: Tensor) -> Tensor:
    """Step algebra is float32 at least, whatever the network's precision."""
    return x if x.dtype == torch.float64 else x.float()


class ChainPolicy(ABC):
    """Policy over a chain of T steps; see `diffalign.types.Policy`.

    Args:
        timestep, levels: the sampler's (T,) timesteps and T+1 noise levels.
        process, noise_level: how a step follows from a prediction.
        micro_batch: roots per forward pass. Rollout and replay use the same batch shape, so first-pass ratios are exactly 1.
        stretches: first steps of the stretches that prompts with stages tell apart.
    """

    parameters: dict[str, Tensor]

    def __init__(
        self,
        timestep: np.ndarray,
        levels: Levels,
        process: Process,
        noise_level: float,
        micro_batch: int,
        stretches: Sequence[int] = (0,),
    ) -> None:
        self.levels = levels
        self.stretches = tuple(stretches)
        self._clean = levels.parts()[:2]
        self._shift = NO_SHIFT
        self.noisy: Table = process.table(levels, noise_level)
        self.quiet: Table = process.table(levels, 0.0)
        gain = np.abs(self.noisy.prediction)
        self.schedule = Schedule(timestep, levels.alpha, levels.sigma, self.noisy.std, gain, levels.prediction)
        self.micro_batch = micro_batch
        self.shadows: dict[str, dict[str, Tensor]] = {}
        self.rows_forward = 0
        self.rows_backward = 0

    # -- what a backend provides

    @abstractmethod
    def start(self, prompts: Prompts, seeds: Sequence[int]) -> Tensor:
        """Initial latents (N, D...), row k drawn from seeds[k]."""

    @abstractmethod
    def drive(self, prompts: Prompts, x: Tensor, steps: Sequence[int], on_step: OnStep) -> None:
        """Run the network at rising steps from latents x, handing every prediction to `on_step`."""

    @abstractmethod
    def predict(self, part: Rollout, x: Tensor, time: Tensor) -> Tensor:
        """The network's prediction at latents x (N, D...) and times (N,) in [0, 1] for the part's leaves."""

    @abstractmethod
    def pixels(self, prompts: Prompts, x: Tensor) -> Media:
        """Decode finished latents, with gradient to them."""

    @abstractmethod
    @contextmanager
    def reference(self) -> Iterator[None]:
        """The model before training, without gradient, for the length of the context."""
        yield

    @property
    def exact(self) -> bool:
        """Whether a replay must reproduce a rollout bit for bit (float32 or wider on the CPU)."""
        return all(
            p.device.type == "cpu" and p.dtype in (torch.float32, torch.float64) for p in self.parameters.values()
        )

    # -- what follows from it

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
        record = Rollout(prompts, plan, tree, self.micro_batch, [x], [], [], [], [])

        def advance(step: int, x: Tensor, prediction: Tensor, mean: Tensor) -> Tensor:
            std, levels = self.table(plan, step)[2], arrival(plan, step) - step
            mean_child = mean[tree.parent[step]]
            if std > 0:
                eps = self._noise(prompts, plan, step, like=mean)
                x_next = mean_child + std * eps
                # On exactly the tensor that is stored, or the first ratio is not 1.
                record.log_prob.append(gaussian.log_prob(x_next, mean_child, std, reduce="mean"))
                record.eps.append(eps)
            else:
                x_next = mean_child
                record.log_prob.extend([None] * levels)
                record.eps.extend([None] * levels)
            for _ in range(levels):
                record.x.append(x_next)
                record.mean.append(mean if plan.keep_mean else None)
                record.std.append(std)
            return x_next

        self._walk(prompts, tree, plan, x, 0, plan.stop, advance)
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

    def _walk(
        self,
        prompts: Prompts,
        tree: Tree,
        plan: Plan,
        x: Tensor,
        start: int,
        stop: int,
        advance: Advance,
        steps: Collection[int] | None = None,
        detached: bool = False,
    ) -> Tensor:
        """Run steps [start, stop) over a forest: one drive per stretch of equal texts and parameters without branching.

        steps: where the network's output carries gradient, None: everywhere; detached: its input carries none.
        """
        latent, graph = x, torch.is_grad_enabled()
        mean_of = self._means(plan, start)

        def on_step(step: int, prediction: Tensor, seen: Tensor) -> Tensor:
            nonlocal latent
            prediction = wide(prediction)
            with torch.set_grad_enabled(graph):
                mean = mean_of(step, latent, prediction)  # on our own wide copy of the latent
                rows = len(latent)
                latent = advance(step, latent, prediction, mean)
            shown = latent.detach() if detached else latent
            return shown.to(seen.dtype) if len(latent) == rows else seen

        def circumstances(step: int) -> tuple[int, int | None, bool]:
            shifted = step if step in self._shift[1] else None
            return self.stretch(step), shifted, graph and (steps is None or step in steps)

        ahead = [k for k in range(start, stop) if not plan.leaves_out(k)]
        while ahead:
            stretch, shifted, learns = now = circumstances(ahead[0])
            pairs = itertools.pairwise(ahead)
            ends = (i + 1 for i, (k, to) in enumerate(pairs) if plan.branch[k] > 1 or circumstances(to) != now)
            end = next(ends, len(ahead))
            told = prompts.select(tree.root[ahead[0]]).told(stretch)
            with self._moved(shifted), torch.set_grad_enabled(learns):
                self.drive(told, latent.detach() if detached else latent, ahead[:end], on_step)
            ahead = ahead[end:]
        return latent

    def _means(self, plan: Plan, start: int) -> Callable[[int, Tensor, Tensor], Tensor]:
        """(step, latent, prediction) -> mean of the next latent, for the steps of a walk in order.

        Raises:
            ValueError: for a walk that starts after the solver did, whose memory it would lack.
        """
        if plan.solver and start > plan.solver[0]:
            raise ValueError(
                f"step {start} follows from steps of a solver before it, the first of them {plan.solver[0]}"
            )
        jumps = dpm_solver.jumps(self.levels, plan.solver) if plan.solver else None
        past: Tensor | None = None

        def mean(step: int, latent: Tensor, prediction: Tensor) -> Tensor:
            nonlocal past
            if jumps is None or step not in plan.solver:
                coefficient, gain, _ = self.table(plan, step)
                return coefficient * latent + gain * prediction  # a x + b prediction
            k = plan.solver.index(step)
            found = float(jumps.x[k]) * latent + float(jumps.prediction[k]) * prediction
            found = found if past is None else found + float(jumps.past[k]) * past
            past = float(jumps.clean_x[k]) * latent + float(jumps.clean_prediction[k]) * prediction
            return found

        return mean

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
        self._walk(part.prompts, part.tree, single, part.x[step], step, step + 1, advance)
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

        x = self._walk(part.prompts, part.tree, part.plan, part.x[start], start, stop, advance, steps, detached)
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

    def decode(self, part: Rollout, x: Tensor) -> Media:
        """Decode latents of the part's leaves."""
        return self.pixels(part.prompts.select(part.tree.leaf_root), x)

    # -- noise on the parameters

    def _direction(self, draw: int, step: int) -> dict[str, Tensor]:
        """Standard normal noise of the parameters' shapes, a function of draw and step alone."""
        return {
            k: normal([draw], p.shape, Purpose.DIRECTION, step, index, like=p)[0]
            for index, (k, p) in enumerate(self.parameters.items())
        }

    @contextmanager
    def shifted(self, draw: int, steps: Collection[int], scale: float) -> Iterator[None]:
        """Walk each of some steps with parameters + scale * its own noise, without gradient, for the length of the context."""
        self._shift = draw, frozenset(steps), scale
        try:
            with torch.no_grad():
                yield
        finally:
            self._shift = NO_SHIFT

    def along(self, draw: int, steps: Collection[int]) -> Tensor:
        """<parameters, sum of the steps' noises>: its gradient is that sum."""
        noises = [self._direction(draw, step) for step in steps]
        return torch.stack([(p * sum(noise[k] for noise in noises)).sum() for k, p in self.parameters.items()]).sum()

    @contextmanager
    def _moved(self, step: int | None) -> Iterator[None]:
        if step is None:
            yield
            return
        draw, _, scale = self._shift
        noise = self._direction(draw, step)
        with self._swapped({k: p.data + scale * noise[k] for k, p in self.parameters.items()}):
            yield

    @contextmanager
    def _swapped(self, values: dict[str, Tensor]) -> Iterator[None]:
        """Other values for the parameters, for the length of the context."""
        own = {k: p.data for k, p in self.parameters.items()}
        try:
            for k, p in self.parameters.items():
                p.data = values[k]
            yield
        finally:
            for k, p in self.parameters.items():
                p.data = own[k]

    # -- shadows: slow copies of the parameters

    def add_shadows(self, names: Iterable[str]) -> None:
        """Start a shadow per name at the current parameters."""
        for name in names:
            self.shadows.setdefault(name, {k: p.detach().clone() for k, p in self.parameters.items()})

    @torch.no_grad()
    def follow(self, decays: dict[str, float]) -> None:
        """shadow <- decay * shadow + (1 - decay) * parameters: 0 copies, 1 freezes."""
        for name, decay in decays.items():
            for k, slow in self.shadows[name].items():
                slow.lerp_(self.parameters[k].to(slow.dtype), 1 - decay)

    @contextmanager
    def shadow(self, name: str) -> Iterator[None]:
        """Use a shadow's parameters, without gradient, for the length of the context."""
        with torch.no_grad(), self._swapped(self.shadows[name]):
            yield


def arrival(plan: Plan, step: int) -> int:
    """The level that a step leads to."""
    return next((k for k in range(step + 1, plan.stop) if not plan.leaves_out(k)), plan.stop)


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
