"""Gradients of rules on one batch, drawn again and again with new noise."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch

from diffalign.backends.toy import ToyPolicy, toy_reward
from diffalign.comparing.gradients import statistics
from diffalign.config import Config
from diffalign.prompts.book import Book
from diffalign.protocols import Loss, Needs, Policy, RewardFunction, TrainablePolicy
from diffalign.rewards.scorer import Scorer
from diffalign.rules import Rule
from diffalign.runs import parts as build
from diffalign.runtime.memory import Live
from diffalign.training.fitting import fit
from diffalign.training.trainer import Trainer
from diffalign.types import Credit, Floats, Plan, Prompts, Rollout, Schedule, Term


class FullBackpropagation(Rule):
    """The reward's gradient through steps [start, T), with the noise of a rule's plan: all of it at start 0."""

    name: ClassVar[str] = "full backpropagation"

    def __init__(self, noise: tuple[bool, ...], start: int = 0) -> None:
        super().__init__()
        self.noise, self.start = noise, start

    def plan(self, schedule: Schedule, update: int, rng: np.random.Generator) -> Plan:
        return Plan(self.start, self.noise, ((Term(self.start, schedule.steps, "reward"),),))

    @property
    def needs(self) -> Needs:
        return Needs(differentiable_reward=True)

    def loss(self, term: Term, policy: Policy, part: Rollout, credit: Credit | None, reward: RewardFunction) -> Loss:
        return Loss(-reward(policy.decode(part, policy.replay(part, term.start, term.stop).x)).mean())


@dataclass(frozen=True)
class Measured:
    """What was found of one rule; norms in the reward's units.

    bias, bias_low, bias_high: ||E[g] - E[G]|| / ||E[G]||, G full backpropagation with the same noise; cosine and its
    interval; not numbers where noise hides them, which about `enough` batches would resolve, null: not known; variance:
    trace of the covariance, of one sample's gradient; term_norm (T,): the norm of the term that covers a step; rows of the
    network, seconds and bytes saved for the gradient at once, per batch; signal to noise of a batch, and of as many as a
    second holds.
    """

    label: str
    rule: dict[str, Any]
    batches: int
    samples: int
    norm: float
    bias: float
    bias_low: float | None
    bias_high: float | None
    cosine: float
    cosine_low: float | None
    cosine_high: float | None
    enough: int | None
    variance: float
    term_norm: list[float | None]
    rows_forward: float
    rows_backward: float
    seconds: float
    peak_bytes: int
    memory_bytes: int | None
    signal_to_noise: float
    signal_to_noise_per_second: float


@dataclass
class Sample:
    """Gradients (M, P) of one rule and what they cost."""

    gradients: Floats
    rows_forward: float
    rows_backward: float
    seconds: float
    peak_bytes: int
    memory_bytes: int | None
    term_norm: list[float | None]


class Laboratory:
    """One policy, one batch of prompts, new noise for every gradient.

    Args:
        config: model, sampler, rewards and prompts of all measurements.
        chain: on the Gaussian chain instead of the config's model, with its sampler.
        batches: gradients per rule.
    """

    def __init__(self, config: Config, batches: int, chain: bool) -> None:
        self.config, self.batches = config, batches
        self.policy, self.scorer = _chain(config) if chain else _pipeline(config)
        book = Book([{"prompt": "a"}]) if chain else config.book
        groups, size = config.prompts.groups, config.prompts.group_size
        self.draw: Callable[[int], Prompts] = functools.partial(book.draw, groups, size, config.seed)
        self.reference = cache(self._reference)

    def measure(self, label: str, config: Config) -> Measured:
        """Everything about one config's rule."""
        rule = config.make_rule()
        fit(rule, self.policy, self.scorer, self._batch(0).select(range(config.micro_batch)))
        sample = self._sample(rule)
        noise = rule.plan(self.policy.schedule, 0, np.random.default_rng(0)).noise
        products = statistics.Products.of(sample.gradients, self.reference(noise).gradients)
        bias, angle = statistics.relative_bias(products), statistics.cosine(products)
        signal = statistics.signal_to_noise(products.rule)
        return Measured(
            label,
            config.rule,
            self.batches,
            config.samples_per_update,
            max(0.0, statistics.off_diagonal_mean(products.rule)) ** 0.5,
            bias.value,
            bias.low,
            bias.high,
            angle.value,
            angle.low,
            angle.high,
            statistics.enough(products),
            statistics.variance(products.rule) * config.samples_per_update,
            sample.term_norm,
            sample.rows_forward,
            sample.rows_backward,
            sample.seconds,
            sample.peak_bytes,
            sample.memory_bytes,
            signal,
            signal / sample.seconds,
        )

    def contributions(self, noise: tuple[bool, ...], batches: int) -> list[float]:
        """(T,) norms of what each step's copy of the parameters contributes to the exact gradient.

        The copies of steps k.. give the gradient G_k of a chain cut before step k; one copy's is G_k - G_{k+1}.
        """
        steps = self.policy.schedule.steps
        sums = [torch.zeros(0)] * steps
        squares = np.zeros(steps)
        for index in range(batches):
            after: torch.Tensor | float = 0.0
            for start in reversed(range(steps)):
                self._trainer(FullBackpropagation(noise, start)).gradient(index)
                whole = self._gradient()
                copy = whole - after
                sums[start] = copy if not index else sums[start] + copy
                squares[start] += float(copy.square().sum())
                after = whole
        norms = [(float(s.square().sum()) - q) / (batches * (batches - 1)) for s, q in zip(sums, squares, strict=True)]
        return [max(0.0, value) ** 0.5 for value in norms]

    def _batch(self, update: int) -> Prompts:
        """The first batch's prompts with the noise of another update."""
        first, drawn = self.draw(0), self.draw(update)
        return replace(first, seed=drawn.seed, group_seed=drawn.group_seed)

    def _trainer(self, rule: Rule) -> Trainer:
        return Trainer(
            rule,
            self.policy,
            self.scorer,
            torch.optim.SGD(self.policy.parameters.values(), lr=0.0),
            self._batch,
            seed=self.config.seed,
            term_norms=True,
        )

    def _gradient(self) -> torch.Tensor:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.policy.parameters.values()]
        return torch.cat([grad.flatten() for grad in grads]).double().cpu()

    def _reference(self, noise: tuple[bool, ...]) -> Sample:
        return self._sample(FullBackpropagation(noise))

    def _sample(self, rule: Rule) -> Sample:
        """M gradients of a rule whose parameters never move; what it learns on the way it does learn."""
        trainer, policy = self._trainer(rule), self.policy
        cuda = next(iter(policy.parameters.values())).is_cuda
        peak = _counted(trainer)  # a pass of its own: counting takes time
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        forward, backward = policy.rows_forward, policy.rows_backward
        norms: dict[int, list[float]] = defaultdict(list)
        gradients, seconds = [], []
        for index in range(self.batches):
            started = time.perf_counter()
            update = trainer.gradient(index)
            gradients.append(self._gradient().numpy())
            seconds.append(time.perf_counter() - started)
            rule.after_update(update)
            for (start, stop), norm in update.term_norms.items():
                for step in range(start, stop):
                    norms[step].append(norm)
        return Sample(
            np.stack(gradients),
            (policy.rows_forward - forward) / self.batches,
            (policy.rows_backward - backward) / self.batches,
            float(np.median(seconds)),
            peak,
            torch.cuda.max_memory_allocated() if cuda else None,
            [float(np.mean(norms[k])) if k in norms else None for k in range(policy.schedule.steps)],
        )


def _counted(trainer: Trainer) -> int:
    """The most bytes that a step's gradient allocates at once, sampling left out."""
    backward, live = trainer.backward.accumulate, Live()

    def counted(*args: Any, **kwargs: Any) -> Any:
        with live:
            return backward(*args, **kwargs)

    trainer.backward.accumulate = counted  # type: ignore[method-assign]
    try:
        trainer.gradient(0)
    finally:
        trainer.backward.accumulate = backward  # type: ignore[method-assign]
    return live.peak


def _pipeline(config: Config) -> tuple[TrainablePolicy, Scorer]:
    parts = build.build(config)
    return parts.policy, parts.scorer


def _chain(config: Config) -> tuple[TrainablePolicy, Scorer]:
    """The Gaussian chain with the config's sampler, away from its reference model, so that nothing vanishes by symmetry."""
    sampler = config.sampler
    size = config.micro_batch
    policy = ToyPolicy(steps=sampler.steps, process=sampler.process, noise_level=sampler.noise_level, micro_batch=size)
    with torch.no_grad():
        policy.delta.add_(0.1)
    return policy, Scorer({"toy": toy_reward})
