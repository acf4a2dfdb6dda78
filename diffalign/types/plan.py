"""What one update does, as data: its terms, and what of a rollout they read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Term:
    """One piece of a loss: steps [start, stop) seen through the reward's gradient, a slope that an earlier term kept, log-probs, the
    forward process, stored latents as they are, or noise on the parameters. steps: those it is about, None: all; draw: key of noise of
    its own, 0: it has none; mirrored: that noise with its sign turned round; stored: of the forward process, at the latents that its level
    had in the rollout; keep_slope: its loss's gradient to the latents of `start` is kept for the terms after it, of the same micro-batch.
    """

    start: int
    stop: int
    through: Literal["reward", "slope", "log_prob", "forward", "state", "parameters"]
    weight: float = 1.0
    steps: tuple[int, ...] | None = None
    draw: int = 0
    keep_slope: bool = False
    mirrored: bool = False
    stored: bool = False

    def __str__(self) -> str:
        at = "" if self.steps is None else f" at {', '.join(map(str, self.steps))}"
        turned, kept = " mirrored" if self.mirrored else "", " -> slope" if self.keep_slope else ""
        turned += " as sampled" if self.stored else ""
        return f"{self.through}[{self.start},{self.stop}){at}{turned} x {self.weight:.3g}{kept}"


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
        starts from the last, unless its states are the stored ones); all where nothing is trained."""
        terms = [term for terms in self.updates for term in terms]
        if not terms:
            return frozenset(range(self.stop + 1))
        noisy = [level for k, on in enumerate(self.noise[: self.stop]) if on for level in (k, k + 1)]
        read = [term for term in terms if term.through != "forward" or term.stored]
        ends = [level for term in read for level in (term.start, term.stop)]
        return frozenset([self.stop, *noisy, *ends])

    @property
    def rewalked(self) -> frozenset[int]:
        """Steps that are walked again with their noise; all where nothing is trained."""
        terms = [term for terms in self.updates for term in terms]
        spans = [range(term.start, term.stop) for term in terms if self.keep_noise and term.through != "forward"]
        return frozenset(range(self.stop)) if not terms else frozenset(k for span in spans for k in span)

    @property
    def scored(self) -> bool:
        """Whether samples are scored as they are drawn: those to the end, unless a term asks the rewards about just these."""
        asked = any(term.keep_slope and term.through == "reward" for terms in self.updates for term in terms)
        return self.stop == len(self.noise) and not asked

    @property
    def pathwise(self) -> int:
        """How many terms go through the reward's gradient."""
        return sum(term.through == "reward" for terms in self.updates for term in terms)

    @property
    def perturbed(self) -> int:
        """How many terms perturb the parameters."""
        return sum(term.through == "parameters" for terms in self.updates for term in terms)
