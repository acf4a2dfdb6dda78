"""The data that flow through one update. Needs no torch to import.

Prompts -> Plan -> Rollout -> Media -> Scores -> Credit -> Loss per Term -> optimiser step.

Legend for shapes: N samples (roots), T steps, F frames, D... a latent's shape, N_t nodes at level t of a forest. Step t leads
from level t to level t + 1; level 0 is pure noise and level T the finished latent. Roots index prompts and seeds, the leaves
at level T index scores. A chain is a forest that never branches: N_t = N everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

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
class Term:
    """One piece of a loss: steps [start, stop) seen through the reward's gradient, log-probs, the forward process, or noise
    on the parameters. steps: those it is about, None: all; draw: key of noise of its own, 0: it has none.
    """

    start: int
    stop: int
    through: Literal["reward", "log_prob", "forward", "parameters"]
    weight: float = 1.0
    steps: tuple[int, ...] | None = None
    draw: int = 0

    def __str__(self) -> str:
        at = "" if self.steps is None else f" at {', '.join(map(str, self.steps))}"
        return f"{self.through}[{self.start},{self.stop}){at} x {self.weight:.3g}"


@dataclass(frozen=True)
class Plan:
    """What one update does, as data.

    stop: level to sample to (T: to the end); noise (T): which steps inject noise; updates: the optimiser steps, each a tuple
    of terms; branch (T): children of every node at a step; correlation: of siblings' noise, in [0, 1]; shared_start: one
    initial noise per group; keep_mean: store each step's mean; keep_noise: that of steps
    that terms are about, False where none of them is walked again; sampled_by: the shadow that samples, "": the parameters;
    solver: steps that DPM-Solver++ takes, each to the next one's level and the last to T, leaving out those between.
    """

    stop: int
    noise: tuple[bool, ...]
    updates: tuple[tuple[Term, ...], ...]
    branch: tuple[int, ...] = ()
    correlation: float = 0.0
    shared_start: bool = False
    keep_mean: bool = False
    keep_noise: bool = True
    sampled_by: str = ""
    solver: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        steps = len(self.noise)
        if not self.branch:
            object.__setattr__(self, "branch", (1,) * steps)
        if not 0 <= self.stop <= steps or len(self.branch) != steps:
            raise ValueError(f"plan: stop {self.stop} and {len(self.branch)} branch factors do not fit {steps} steps")
        for index, (children, noisy) in enumerate(zip(self.branch, self.noise, strict=True)):
            if children > 1 and not noisy:
                raise ValueError(f"plan: step {index} branches without noise, its children would be equal")
        if self.solver and (any(self.noise[self.solver[0] :]) or self.stop != steps):
            raise ValueError(
                f"plan: a solver from step {self.solver[0]} on needs a sampler without noise there, to the end"
            )
        for term in (term for terms in self.updates for term in terms):
            if not 0 <= term.start <= term.stop <= steps:
                raise ValueError(f"plan: term [{term.start}, {term.stop}) lies outside {steps} steps")

    @classmethod
    def deterministic(cls, steps: int) -> Plan:
        """Sampling without noise to the end, nothing trained."""
        return cls(stop=steps, noise=(False,) * steps, updates=())

    def leaves_out(self, step: int) -> bool:
        """Whether the solver jumps over a step."""
        return bool(self.solver) and step > self.solver[0] and step not in self.solver

    def arrival(self, step: int) -> int:
        """The level that a step leads to."""
        return next((k for k in range(step + 1, self.stop) if not self.leaves_out(k)), self.stop)

    @property
    def levels(self) -> frozenset[int]:
        """Levels whose latents are read after sampling: the last, those that terms and noisy steps lead from and to (the forward process
        starts from the last); all where nothing is trained."""
        terms = [term for terms in self.updates for term in terms]
        if not terms:
            return frozenset(range(self.stop + 1))
        noisy = [level for k, on in enumerate(self.noise[: self.stop]) if on for level in (k, k + 1)]
        ends = [level for term in terms if term.through != "forward" for level in (term.start, term.stop)]
        return frozenset([self.stop, *noisy, *ends])

    @property
    def rewalked(self) -> frozenset[int]:
        """Steps that are walked again with their noise; all where nothing is trained."""
        terms = [term for terms in self.updates for term in terms]
        spans = [range(term.start, term.stop) for term in terms if self.keep_noise and term.through != "forward"]
        return frozenset(range(self.stop)) if not terms else frozenset(k for span in spans for k in span)

    @property
    def pathwise(self) -> int:
        """How many terms go through the reward's gradient."""
        return sum(term.through == "reward" for terms in self.updates for term in terms)

    @property
    def perturbed(self) -> int:
        """How many terms perturb the parameters."""
        return sum(term.through == "parameters" for terms in self.updates for term in terms)


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
    not read is not kept: latents of other levels are (N_t, 0), other noises and means None.
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

    def at(self, level: int) -> Prompts:
        """The prompts of the nodes of a level."""
        return self.prompts.select(self.tree.root[level])


@dataclass(frozen=True)
class Media:
    """Finished pictures or videos: pixels (N, F, 3, H, W) float in [0, 1]; F = 1 for pictures; frames per second."""

    pixels: Tensor
    fps: float = 8.0


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


Credit = list[Floats]  # per step t, (N_{t+1},): how much better than expected each edge was


Span = tuple[int, int]  # steps [start, stop)


@dataclass(frozen=True)
class Update:
    """What one update did.

    scored, unscored: samples with and without a score, of all processes, both 0 where nothing was scored beforehand; judged: those
    samples and their scores; flat: nothing was to be learnt from them; steps, nonfinite: optimiser steps, and those skipped since their
    gradient was not finite; term_norms: of each term's own gradient by its steps, where the rule needs them; metrics: numbers to log.
    """

    scored: int = 0
    unscored: int = 0
    flat: bool = False
    steps: int = 0
    nonfinite: int = 0
    judged: tuple[Prompts, Scores] | None = None
    term_norms: dict[Span, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, float]:
        """What is logged."""
        norms = {f"term_norm/{start}-{stop}": norm for (start, stop), norm in self.term_norms.items()}
        flags = {"skipped_flat": 1.0} if self.flat else {}
        return {**self.metrics, **norms, **flags}


def chunks(count: int, size: int) -> Iterator[range]:
    """Consecutive ranges of at most `size` that cover range(count)."""
    for start in range(0, count, size):
        yield range(start, min(start + size, count))
