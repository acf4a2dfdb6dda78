"""The data that flow through one update. Needs no torch to import.

Prompts -> Plan -> Rollout -> Media -> Scores -> Credit -> Loss per Term -> optimiser step.

Legend for shapes: N samples (roots), T steps, F frames, D... a latent's shape, N_t nodes at level t of a forest. Step t leads
from level t to level t + 1; level 0 is pure noise and level T the finished latent. Roots index prompts and seeds, the leaves
at level T index scores. A chain is a forest that never branches: N_t = N everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffalign.types.plan import Plan as Plan
from diffalign.types.plan import Term as Term

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Rows = Sequence[int] | Integers


@dataclass(frozen=True)
class Prompts:
    """What to draw: one entry a sample.

    text (N) strings; group (N,) integer ids of samples whose rewards are compared; seed (N,) keys of all noise of a sample;
    group_seed (N,) keys a group shares; metadata (N) dicts for the rewards; stages (N) tuples of equal length: what the
    sampler is told instead of `text` on each stretch of the chain, empty to tell it `text` throughout.
    """

    text: list[str]
    group: Integers
    seed: Integers
    group_seed: Integers
    metadata: list[dict[str, Any]]
    stages: list[tuple[str, ...]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.text)

    def __iter__(self) -> Iterator[str]:
        """Over the texts, as a reward would expect of prompts."""
        return iter(self.text)

    def __getitem__(self, number: int) -> str:
        return self.text[number]

    def select(self, rows: Rows) -> Prompts:
        """The prompts of some rows, in the given order, with repeats if asked for."""
        picked = np.asarray(rows, dtype=np.int64)
        return Prompts(
            [self.text[k] for k in picked],
            self.group[picked],
            self.seed[picked],
            self.group_seed[picked],
            [self.metadata[k] for k in picked],
            [self.stages[k] for k in picked] if self.stages else [],
        )

    def on_stretch(self, stretch: int) -> Prompts:
        """The same with the texts of a stretch of the chain."""
        return replace(self, text=[texts[stretch] for texts in self.stages]) if self.stages else self


@dataclass(frozen=True)
class Schedule:
    """The sampler as configured, float64.

    timestep (T,) what the network is told; alpha, sigma (T+1,) with x_t = alpha x_0 + sigma noise; std (T,) of the noise each
    step injects when its noise is on (0: deterministic); gain (T,) = |d mean / d prediction| of each step, noise on;
    prediction: what the network predicts: velocity, epsilon, v_prediction or sample.
    """

    timestep: Floats
    alpha: Floats
    sigma: Floats
    std: Floats
    gain: Floats
    prediction: str = "velocity"

    @property
    def steps(self) -> int:
        return len(self.timestep)


@dataclass(frozen=True)
class Tree:
    """A forest: root[t] (N_t,) is the root of each node, parent[t] (N_{t+1},) its parent's index at level t."""

    root: list[Integers]
    parent: list[Integers]

    @classmethod
    def grow(cls, roots: int, branch: Sequence[int]) -> Tree:
        """`branch[t]` children for every node of level t; siblings are neighbours."""
        root, parent = [np.arange(roots)], []
        for children in branch:
            parent.append(np.repeat(np.arange(len(root[-1])), children))
            root.append(root[-1][parent[-1]])
        return cls(root, parent)

    @property
    def leaf_root(self) -> Integers:
        """(N_T,) root of every leaf."""
        return self.root[-1]

    def nodes(self, roots: Rows) -> list[Integers]:
        """Indices, level by level, of the nodes that grow from some roots, in those roots' order."""
        order = np.asarray(roots, dtype=np.int64)
        if len(self.root[0]) == len(self.leaf_root):
            return [order] * len(self.root)
        return [np.concatenate([np.flatnonzero(level == root) for root in order]) for level in self.root]

    def select(self, roots: Rows) -> Tree:
        """The part of the forest that grows from some roots, renumbered."""
        kept = self.nodes(roots)
        place = [np.full(len(level), -1) for level in self.root]
        for level, indices in zip(place, kept, strict=True):
            level[indices] = np.arange(len(indices))
        parent = [place[t][self.parent[t][kept[t + 1]]] for t in range(len(self.parent))]
        root = [place[0][self.root[t][kept[t]]] for t in range(len(self.root))]
        return Tree(root, parent)


@dataclass(frozen=True)
class Rollout:
    """Sampled trajectories up to level `plan.stop`, drawn `micro_batch` roots at a time.

    x[t] (N_t, D...) latents; eps[t] (N_{t+1}, D...) the noise injected at step t, None where off; mean[t] (N_t, D...) if the
    plan keeps it; std[t] the noise's standard deviation; log_prob[t] (N_{t+1},) log density of x[t+1], averaged over latent
    dimensions, None where the step is deterministic. Levels that a solver leaves out hold the latent it jumps to. What the plan's terms do
    not read is not kept: latents of other levels are (N_t, 0), other noises and means None. slope[t] (N_t, D...): of a micro-batch, what
    terms kept: gradients of their losses to x[t].
    """

    prompts: Prompts
    plan: Plan
    tree: Tree
    micro_batch: int
    x: list[Tensor]
    eps: list[Tensor | None]
    mean: list[Tensor | None]
    std: list[float]
    log_prob: list[Tensor | None]
    slope: dict[int, Tensor] = field(default_factory=dict)

    def select(self, roots: Rows) -> Rollout:
        """The trajectories that grow from some roots."""
        kept = self.tree.nodes(roots)

        def rows(values: list[Tensor | None], level: int) -> list[Tensor | None]:
            return [None if v is None else v[kept[t + level]] for t, v in enumerate(values)]

        return replace(
            self,
            prompts=self.prompts.select(roots),
            tree=self.tree.select(roots),
            x=[x[kept[t]] for t, x in enumerate(self.x)],
            eps=rows(self.eps, 1),
            mean=rows(self.mean, 0),
            log_prob=rows(self.log_prob, 1),
        )

    def entered(self, level: int) -> tuple[Rollout, Tensor]:
        """The same trajectories, and their latents of a level, which are a leaf that takes a gradient."""
        leaf = self.x[level].detach().requires_grad_()
        return replace(self, x=[leaf if t == level else x for t, x in enumerate(self.x)]), leaf

    def at(self, level: int) -> Prompts:
        """The prompts of the nodes of a level."""
        return self.prompts.select(self.tree.root[level])


@dataclass(frozen=True)
class Media:
    """Finished pictures or videos: pixels (N, F, 3, H, W) float in [0, 1]; F = 1 for pictures; frames per second, None: not known."""

    pixels: Tensor
    fps: float | None = None


@dataclass(frozen=True)
class Scores:
    """Rewards of N_T media: by_name and total (N_T,) float64; valid (N_T,) False where a reward had no score.

    weights: of the rewards in `total`; log_prob: of the rollout's edges, T arrays (N_{t+1},), averaged over latent dimensions
    and 0 where a step is deterministic; only for rules that need it.
    """

    by_name: dict[str, Floats]
    total: Floats
    valid: NDArray[np.bool_]
    weights: dict[str, float] = field(default_factory=dict)
    log_prob: list[Floats] | None = None


@dataclass(frozen=True)
class Credit:
    """edges: per step t, (N_{t+1},): how much better than expected each edge was; rows: other numbers about the leaves (N_T,), by name."""

    edges: list[Floats]
    rows: dict[str, Floats] = field(default_factory=dict)

    def select(self, tree: Tree, roots: Rows) -> Credit:
        """That of the trajectories that grow from some roots of a tree."""
        kept = tree.nodes(roots)
        edges = [values[kept[t + 1]] for t, values in enumerate(self.edges)]
        return Credit(edges, {name: values[kept[-1]] for name, values in self.rows.items()})


Span = tuple[int, int]  # steps [start, stop)


@dataclass(frozen=True)
class Update:
    """What one update did.

    scored, unscored: samples with and without a score, of all processes, both 0 where nothing was scored beforehand; scouted: samples
    scored before that, to choose which are drawn; judged: the samples and their scores; values: where there are none, each reward's
    scores as gradients were taken, in any order; flat: nothing was to be learnt from them; steps, nonfinite: optimiser steps, and those
    skipped since their gradient was not finite; term_norms: of each term's own gradient by its steps, where the rule needs them; metrics:
    numbers to log.
    """

    scored: int = 0
    unscored: int = 0
    scouted: int = 0
    flat: bool = False
    steps: int = 0
    nonfinite: int = 0
    judged: tuple[Prompts, Scores] | None = None
    values: dict[str, Floats] = field(default_factory=dict)
    term_norms: dict[Span, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, float]:
        """What is logged."""
        norms = {f"term_norm/{start}-{stop}": norm for (start, stop), norm in self.term_norms.items()}
        flags = {"skipped_flat": 1.0} if self.flat else {}
        return {**self.metrics, **norms, **flags}


def rows_by_group(group: Integers, among: NDArray[np.bool_] | None = None) -> list[Integers]:
    """The rows of each of some groups' ids (N,), groups in the order in which they come; among (N,): only these rows."""
    here = np.ones(len(group), dtype=bool) if among is None else among
    return [np.flatnonzero((group == name) & here) for name in dict.fromkeys(group[here].tolist())]


def chunks(count: int, size: int) -> Iterator[range]:
    """Consecutive ranges of at most `size` that cover range(count)."""
    for start in range(0, count, size):
        yield range(start, min(start + size, count))
