"""What rules share that learn from finished samples, noised anew: AWM and DiffusionNFT.

With d = v - v_old and e = v_old - v*, v* the target, NFT's loss in velocity space is a constant plus 2 A <d, e> plus a proximal
term, and AWM's, which has A / limit for A, is A |e|^2 + 2 A <d, e> + A |d|^2 over the limit: where the network is the old one NFT's
gradient is `advantage_limit` times AWM's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from diffalign import ops
from diffalign.errors import UserError
from diffalign.protocols import Policy
from diffalign.rules._merging import MergeSettings, merged
from diffalign.rules._rule import ReferenceSettings, Rule
from diffalign.runtime.randomness import Purpose, normal
from diffalign.runtime.settings import factors
from diffalign.types import Credit, Floats, Integers, Plan, Prompts, Rollout, Schedule, Scores, Term, Tree

if TYPE_CHECKING:
    from torch import Tensor


LEAST_ERROR = 1e-5  # of a self-normalised loss


class ForwardSettings(ReferenceSettings, MergeSettings):
    """Keys of rules that noise finished samples."""

    times: int = Field(3, ge=1, description="noise levels a sample is noised to, per optimiser step")
    spread: Literal["random", "strata", "antithetic"] = Field(
        "random",
        description="strata: one level of each of `times` equal parts; antithetic: each draw with n and -n",
    )
    first_level: bool = Field(False, description="pure noise among them")
    levels: tuple[int, int] | None = Field(
        None, description="first and one past the last of them, 0 is the noisiest; null: all"
    )
    states: Literal["forward", "own"] = Field(
        "forward", description="own: the states samples came through, in place of ones noised anew"
    )
    shared_noise: bool = Field(False, description="one noise for all samples of a group")
    scale: Literal["group", "batch", "none", "softmax"] = Field(
        "batch", description="what advantages are divided by; softmax: exp(R / std) over its mean - 1 (FlowAWR)"
    )
    advantage_limit: float = Field(5.0, gt=0, description="advantages are clipped to +- this, and divided by it")
    kl: float = Field(0.0, ge=0, description="weight of mean (v - v_reference)^2", json_schema_extra=factors(0.1, 10))
    norm: float = Field(
        0.0,
        ge=0,
        description="weight of mean max(0, |v| / |v_reference| - 1 - norm_slack)^2",
        json_schema_extra=factors(0.1, 10),
    )
    norm_slack: float = Field(0.02, ge=0, description="of that: how much longer costs nothing")
    noise: bool = Field(False, description="sample with the process's noise; false: deterministically")
    inner_updates: int = Field(1, ge=1, description="optimiser steps per rollout")

    def problems(self, steps: int) -> list[str]:
        """What is wrong with these settings for a sampler of `steps` steps."""
        problems, (first, stop) = super().problems(steps), self.levels or (0, steps)
        problems += [] if self.norm > 0 else self.idle(("norm_slack",), "rule.norm")
        if self.states == "own":
            drawn = [
                key
                for key, on in (
                    ("spread: antithetic", self.spread == "antithetic"),
                    ("shared_noise", self.shared_noise),
                )
                if on
            ]
            problems += [
                f"rule.{key}: got it with rule.states: own, which draws no noise; allowed with forward" for key in drawn
            ]
        if not 0 <= first < stop <= steps:
            return [
                *problems,
                f"rule.levels: got {[first, stop]}, allowed is 0 <= first < stop <= sampler.steps ({steps})",
            ]
        most = len(self.candidates(steps))
        few = f"rule.times: got {self.times}, allowed is up to the noise levels ({most})"
        return [*problems, *([few] if self.times > most else [])]

    @property
    def referred(self) -> bool:
        """Whether anything is held against the reference."""
        return super().referred or self.norm > 0

    def candidates(self, steps: int) -> range:
        """The levels that samples may be noised to."""
        first, stop = self.levels or (0, steps)
        return range(max(first, not self.first_level), stop)


def plan(schedule: Schedule, settings: ForwardSettings, rng: np.random.Generator, sampled_by: str = "") -> Plan:
    """Sample to the end; terms at drawn levels, the same for every sample, noise anew for each.

    The weights of a step's terms add up to 1, and their mean over draws is the mean over all levels, whatever `spread` is.

    Raises:
        UserError: for epsilon prediction at a level without signal.
    """
    steps = schedule.steps
    levels = np.asarray(settings.candidates(steps))
    if 0 in levels and schedule.prediction == "epsilon" and schedule.alpha[0] == 0:
        raise UserError("rule.first_level: got true, epsilon says nothing about x_0 in pure noise; allowed is false")

    def terms() -> tuple[Term, ...]:
        once = [
            Term(level, level, "forward", weight, draw=int(rng.integers(1, 2**62)), stored=settings.states == "own")
            for level, weight in drawn_levels(levels, settings.times, settings.spread == "strata", rng)
        ]
        if settings.spread != "antithetic":
            return tuple(once)
        half = [replace(term, weight=term.weight / 2) for term in once]
        return tuple(replace(term, mirrored=mirrored) for term in half for mirrored in (False, True))

    noise = tuple(settings.noise and k < steps - 1 for k in range(steps))
    return Plan(steps, noise, tuple(terms() for _ in range(settings.inner_updates)), sampled_by=sampled_by)


def drawn_levels(levels: Integers, times: int, strata: bool, rng: np.random.Generator) -> list[tuple[int, float]]:
    """So many of some levels, from the noisiest on, and what each weighs: 1 / times, or the size of the part that it is drawn from.

    Without strata they are drawn without replacement; with them one is drawn from each of `times` parts in a row, whose sizes differ by
    one at most.
    """
    if not strata:
        return [(int(level), 1 / times) for level in sorted(rng.choice(levels, times, replace=False))]
    parts = np.array_split(levels, times)
    return [(int(rng.choice(part)), len(part) / len(levels)) for part in parts]


@dataclass(frozen=True)
class Noised:
    """Finished samples x0 (N, D...) with noise, at a level of a schedule, and the part to predict at."""

    part: Rollout
    x0: Tensor
    noise: Tensor
    step: int
    schedule: Schedule

    @property
    def alpha(self) -> float:
        return float(self.schedule.alpha[self.step])

    @property
    def sigma(self) -> float:
        return float(self.schedule.sigma[self.step])

    @property
    def prediction(self) -> str:
        return self.schedule.prediction

    def predicted(self, policy: Policy) -> Tensor:
        """What the network predicts at x_t, exactly as it does in sampling."""
        return policy.transition(self.part, self.step).prediction

    @property
    def x(self) -> Tensor:
        return self.part.x[self.step]

    @property
    def target(self) -> Tensor:
        return ops.matching.target(self.x0, self.noise, self.alpha, self.sigma, self.prediction)

    def clean(self, predicted: Tensor) -> Tensor:
        return ops.matching.clean(self.x, predicted, self.alpha, self.sigma, self.prediction)

    def clean_error(self, predicted: Tensor) -> Tensor:
        """mean_d (x0' - x0)^2 / stopgrad(mean_d |x0' - x0|), x0' the clean sample that a prediction implies; (N,)."""
        clean = self.clean(predicted)
        size = ops.gaussian.reduce_latent((clean - self.x0).detach().abs(), "mean").clamp(min=LEAST_ERROR)
        return ops.matching.error(clean, self.x0) / size


def rising(update: int, highest: float) -> float:
    """A decay that a shadow reaches from 0 in steps of 0.001 an update."""
    return min(highest, 0.001 * update)


class ForwardRule(Rule):
    """What AWM and NFT share: credit, and the divergence from the base model."""

    settings: ForwardSettings

    def renoises(self, steps: int) -> bool:
        """Whether it learns at finished samples with noise drawn anew, at levels of the sampler's second half too."""
        s = self.settings
        return s.states == "forward" and (s.levels is None or 2 * s.levels[1] > steps)

    def credit(self, tree: Tree, scores: Scores, prompts: Prompts) -> Credit:
        """A / limit in [-1, 1], A the group-relative advantage."""
        s, group, valid = self.settings, prompts.group[tree.leaf_root], scores.valid

        def of(_: str, reward: Floats, rounding: float) -> list[Floats]:
            if s.scale == "softmax":
                return [ops.advantages.softmax_relative(reward, group, valid, s.advantage_limit, rounding=rounding)]
            return [ops.advantages.group_relative(reward, group, valid, s.scale, s.advantage_limit, rounding=rounding)]

        (advantage,) = merged(scores, group, s, of)
        return Credit(ops.advantages.average_to_parents(advantage / s.advantage_limit, tree.parent)[1:])

    def held(
        self,
        value: Tensor,
        metrics: dict[str, Tensor],
        at: Noised,
        predicted: Tensor,
        policy: Policy,
        credit: Credit,
        base: Tensor | None = None,
    ) -> Tensor:
        """value + kl mean (v - v_reference)^2, each row by what it weighs, + norm mean max(0, |v| / |v_reference| - 1 - slack)^2, noted in
        `metrics`; base: what the reference predicts, where that is known already.
        """
        s = self.settings
        if s.kl == 0 and s.norm == 0:
            return value
        if base is None:
            with policy.reference():
                base = at.predicted(policy)
        metrics |= ops.norms.metrics(predicted.detach(), base)
        if s.kl > 0:
            kl = ops.matching.error(predicted, base)
            metrics["kl"] = kl.detach().mean()
            if "held" in credit.rows:
                kl = ops.gaussian.like(credit.rows["held"], kl) * kl
            value = value + s.kl * kl.mean()
        if s.norm > 0:
            value = value + s.norm * ops.norms.excess(predicted, base, s.norm_slack).mean()
        return value


def noised(term: Term, policy: Policy, part: Rollout, shared: bool = False) -> Noised:
    """The part's finished samples with the term's noise, in the place of the latents of its level; shared: one noise a group. Where the
    term's states are stored ones: those, and the noise that would have led there, n = (x_t - alpha x_0) / sigma.
    """
    schedule, step, x0 = policy.schedule, term.start, part.x[-1]
    if not term.stored:
        there, noise = renoised(part, schedule, step, Purpose.FORWARD, term.draw, shared, term.mirrored)
        return Noised(there, x0, noise, step, schedule)
    alpha, sigma = float(schedule.alpha[step]), float(schedule.sigma[step])
    return Noised(part, x0, (part.x[step] - alpha * x0) / sigma, step, schedule)


def renoised(
    part: Rollout,
    schedule: Schedule,
    step: int,
    purpose: Purpose,
    draw: int,
    shared: bool = False,
    mirrored: bool = False,
) -> tuple[Rollout, Tensor]:
    """The part with its finished latents noised forward to a step's level, in the place of those it came from; and the noise, which is
    the sample's own, or its group's where it is `shared`; with its sign turned round where it is `mirrored`."""
    x0, prompts = part.x[-1], part.prompts
    seeds = prompts.group_seed if shared else prompts.seed
    noise = normal([int(seed) for seed in seeds], x0.shape[1:], purpose, draw, like=x0)
    noise = -noise if mirrored else noise
    x = ops.matching.noised(x0, noise, float(schedule.alpha[step]), float(schedule.sigma[step]))
    return replace(part, x=[*part.x[:step], x, *part.x[step + 1 :]]), noise


def stepped(policy: Policy, part: Rollout, step: int, draw: int) -> Tensor:
    """x_0 (N, D...) of the part's finished latents, noised to a step's level, after that step without noise, with the noise that they were
    given taken out again: (x' - sigma' n) / alpha' (SRPO, arXiv 2509.06942).

    A right network gives the latents back; the gradient to its prediction is that of x_0 times b / alpha', b the step's coefficient.
    """
    schedule = policy.schedule
    part, noise = renoised(part, schedule, step, Purpose.VARIANT, draw)
    at_x, at_prediction, _ = policy.table(part.plan, step)
    level = float(schedule.alpha[step]), float(schedule.sigma[step])
    alpha, sigma = ops.prediction.arrival(at_x, at_prediction, *level, schedule.prediction)
    return (policy.replay(part, step, step + 1).x - sigma * noise) / alpha
