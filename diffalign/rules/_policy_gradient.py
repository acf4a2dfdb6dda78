"""What policy-gradient rules on stored transitions share: which steps are noisy, their weights, the ratio, advantages, KL."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from diffalign import ops
from diffalign.errors import UserError
from diffalign.protocols import Loss, Needs, Policy, RewardFunction, Transition
from diffalign.rules._merging import merged
from diffalign.rules._pathwise import LastStepSettings
from diffalign.rules._rule import ReferenceSettings, Rule, RuleSettings
from diffalign.rules._trust import Step, TrustSettings, bounded
from diffalign.rules._window import WindowSettings, evenly, spread_out
from diffalign.runtime.settings import factors
from diffalign.types import Credit, Floats, Integers, Plan, Prompts, Rollout, Schedule, Scores, Term, Tree

if TYPE_CHECKING:
    from torch import Tensor

CLIP = "half-width of the ratio's range; ratios average over latent dims"


class PolicyGradientSettings(WindowSettings):
    """Keys that every policy-gradient rule has."""

    step_weight: Literal["none", "equal", "inv_dt", "std"] = Field(
        "none",
        description="a step's weight: equal: none dominates the gradient; inv_dt: 1 / |dt|; std: of its noise",
    )
    inner_updates: int = Field(1, ge=1, description="optimiser steps per rollout")
    shared_start: bool = Field(False, description="one initial noise per group")

    def unused(self) -> set[str]:
        """Keys that nothing uses with these settings."""
        return super().unused() | ({"clip"} if self.inner_updates == 1 else set())  # on a first pass every ratio is 1


class SurrogateSettings(ReferenceSettings, PolicyGradientSettings):
    """Keys of rules with a clipped surrogate and a divergence from the base model."""

    clip: float = Field(1e-4, gt=0, description=CLIP, json_schema_extra=factors(0.1, 10))
    kl: float = Field(
        0.0, ge=0, description="weight of the divergence from the base model", json_schema_extra=factors(0.1, 10)
    )
    kl_space: Literal["prediction", "mean"] = Field(
        "prediction", description="prediction: mean (v - v_reference)^2; mean: that of the steps' Gaussians, per dim"
    )

    def problems(self, steps: int) -> list[str]:
        """What is wrong with these settings for a sampler of `steps` steps."""
        problems = super().problems(steps)
        return problems if self.kl > 0 else [*problems, *self.idle(("kl_space",), "rule.kl")]


class Risk(RuleSettings):
    """Keys of `risk:`."""

    low: float = Field(0.2, gt=0, lt=1, description="the share of worst bundles that counts most")
    high: float = Field(0.9, gt=0, le=1, description="bundles above this quantile count as if they were at it")
    weight: float = Field(1.5, ge=0, description="of the worst against the middle")
    bundle: int = Field(1, ge=1, description="prompts whose rewards are added up, sample by sample")


class GroupSettings(SurrogateSettings):
    """Keys of rules that compare samples of one prompt."""

    scale: Literal["group", "batch", "none"] = Field(
        "group",
        description="what advantages are divided by: the std of the group's rewards, of all rewards, or nothing",
    )
    window_by: Literal["update", "prompt"] = Field(
        "update", description="prompt: window_steps are drawn for each prompt, evenly over the window (Flash-GRPO)"
    )
    fan: int = Field(
        1,
        ge=1,
        description="children of each sample at its first noisy step, which share what came before (Flow-GRPO-Fast)",
    )
    baseline: Literal["group", "leave_one_out"] = Field(
        "group", description="what rewards are compared with: the group's mean, or that of the others in it"
    )
    risk: Risk | None = Field(
        None, description="low, high, weight, bundle: maximise RiskPO's mixed value-at-risk; null: the mean"
    )
    flash: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of steps after the window that run, by DPM-Solver++ 2M (MixGRPO-Flash); null: all",
    )
    last_step: LastStepSettings | None = Field(
        None, description="weight, ceiling: the reward's own gradient too, through the last step alone; null: none"
    )
    keep: int | None = Field(
        None,
        ge=2,
        description="per group, learn from half as many best and half as many worst (DanceGRPO); null: from all",
    )

    def problems(self, steps: int) -> list[str]:
        """What is wrong with these settings for a sampler of `steps` steps."""
        problems = super().problems(steps)
        if self.keep is not None and self.keep % 2:
            problems.append(f"rule.keep: got {self.keep}, allowed are even numbers: half best, half worst")
        if self.risk is not None and self.risk.low >= self.risk.high:
            problems.append(
                f"rule.risk.low: got {self.risk.low:g}, allowed is less than rule.risk.high ({self.risk.high:g})"
            )
        if self.window is None and self.window_steps is None:
            problems += self.idle(("flash",), "rule.window")
        elif self.flash is not None and self.last_step is not None:
            problems.append(
                f"rule.flash: got {self.flash:g} with rule.last_step, which walks a step again that the solver jumps over; allowed is null"
            )
        return [*problems, *self._window_problems()]

    def _window_problems(self) -> list[str]:
        if self.window_by == "update" or self.window_steps is None:
            return self.idle(("window_by",), "rule.window_steps")
        given, problems = "rule.window_by: got prompt, ", []
        if self.window_move == "sliding":
            problems.append(f"{given}a sliding window is at one place; allowed is rule.window_move: random")
        if self.fan > 1:
            problems.append(f"{given}with rule.fan samples of a prompt are one tree; allowed is rule.fan: 1, in groups")
        return problems


def plan(
    schedule: Schedule,
    settings: PolicyGradientSettings,
    span: tuple[int, int],
    *,
    power: int = -1,
    fan: int = 1,
    flash: float | None = None,
    last_step: LastStepSettings | None = None,
    keep_mean: bool = False,
) -> Plan:
    """Sample to the end with noise in the steps [first, stop) of a span; one log-prob term each, weights averaging to 1 / steps
    over the window.

    power: of std in the gradient of the rule's log-ratio, which `equal` undoes. flash, last_step: see `GroupSettings`.

    Raises:
        UserError: for inv_dt on levels that are no flow's.
    """
    noisy = [k for k in range(*span) if schedule.std[k] > 0]
    candidates = [k for k in range(*settings.candidates(schedule.steps)) if schedule.std[k] > 0]
    weights = step_weights(schedule, settings.step_weight, noisy, candidates, power) / len(noisy)
    terms = tuple(Term(k, k + 1, "log_prob", weight=float(w)) for k, w in zip(noisy, weights, strict=True))
    return Plan(
        stop=schedule.steps,
        noise=tuple(k in noisy for k in range(schedule.steps)),
        updates=((*terms, *([] if last_step is None else [last_step.term(schedule.steps)])),) * settings.inner_updates,
        branch=tuple(fan if k == noisy[0] else 1 for k in range(schedule.steps)),
        shared_start=settings.shared_start,
        keep_mean=keep_mean,
        keep_noise=False,
        solver=() if flash is None else evenly(noisy[-1] + 1, schedule.steps, flash),
    )


def step_weights(schedule: Schedule, kind: str, steps: list[int], candidates: list[int], power: int = -1) -> np.ndarray:
    """Weights of steps' losses, of mean 1 over all `candidates`: a step weighs the same whichever others are drawn with it.

    At ratio 1 the gradient on the prediction is A gain std^power / D eps: power -1 of a Gaussian's log-ratio, 0 where it is freed of the
    noise (GRPO-Guard), 1 where it has no 1 / (2 std^2) (`ratio: unweighted`, but for a factor of 2).
    """
    std, gain = schedule.std[candidates], schedule.gain[candidates]
    if kind == "inv_dt":
        if not np.allclose(schedule.alpha + schedule.sigma, 1):
            raise UserError("rule.step_weight: got inv_dt, which only a flow has; allowed here are none, equal, std")
        weights = 1 / -np.diff(schedule.sigma)[candidates]
    else:
        weights = {"none": np.ones(len(candidates)), "equal": 1 / (gain * std**power), "std": std}[kind]
    return (weights / weights.mean())[[candidates.index(step) for step in steps]]


class SurrogateRule(Rule):
    """What rules with a clipped surrogate share."""

    settings: SurrogateSettings

    def surrogate(self, term: Term, policy: Policy, part: Rollout, step: Step, clip: float) -> tuple[Tensor, dict]:
        """max(-A r, -A clip(r)) + kl * divergence from the base model at the term's step, averaged over the part."""
        trust = self.settings if isinstance(self.settings, TrustSettings) else None
        value, metrics = bounded(step, part, term.start, clip, trust)
        if self.settings.kl > 0:
            with policy.reference():
                base = policy.transition(part, term.start)
            # The subtraction stays outside the reference context: its gradient is the point.
            kl = divergence(step.now, base, self.settings.kl_space)
            metrics |= {"kl": kl.detach().mean(), **ops.norms.metrics(step.now.prediction.detach(), base.prediction)}
            kl = (kl if step.held is None else step.held * kl).mean()
            # The step weight belongs to the surrogate alone: undone here, every step weighs 1 / steps.
            value = value + self.settings.kl * kl / (term.weight * sum(part.plan.noise))
        return value, metrics


class GroupRule(SurrogateRule):
    """What rules share that compare samples of one prompt."""

    settings: GroupSettings

    def loss(self, term: Term, policy: Policy, part: Rollout, credit: Credit | None, reward: RewardFunction) -> Loss:
        """The surrogate at a noisy step, see `clipped`; at the last one what `last_step` asks for."""
        if term.through == "reward":
            assert self.settings.last_step is not None
            return self.settings.last_step.loss(term, policy, part, reward)
        return self.clipped(term, policy, part, credit)

    @abstractmethod
    def clipped(self, term: Term, policy: Policy, part: Rollout, credit: Credit | None) -> Loss:
        """max(-A r, -A clip(r)) + kl * divergence at the term's step, averaged over the part."""

    @property
    @abstractmethod
    def power(self) -> int:
        """Of a step's std in the gradient of its log-ratio, see `step_weights`."""

    @property
    @abstractmethod
    def keeps_mean(self) -> bool:
        """Whether the means of the rollout's steps are needed."""

    def plan_at(self, schedule: Schedule, span: tuple[int, int]) -> Plan:
        """What an update does whose steps [first, stop) are noisy."""
        s, (power, mean) = self.settings, (self.power, self.keeps_mean)
        return plan(schedule, s, span, power=power, fan=s.fan, flash=s.flash, last_step=s.last_step, keep_mean=mean)

    def plan(self, schedule: Schedule, update: int, rng: np.random.Generator) -> Plan:
        return self.plan_at(schedule, self.settings.span(schedule.steps, update, rng))

    def plans(
        self, plan: Plan, schedule: Schedule, group: Integers, rng: np.random.Generator
    ) -> list[tuple[Plan, Integers]]:
        if self.settings.window_by == "update":
            return super().plans(plan, schedule, group, rng)
        spans, prompts = self.settings.spans(schedule.steps), np.unique(group)
        place = spread_out(len(prompts), len(spans), rng)[np.searchsorted(prompts, group)]
        return [(self.plan_at(schedule, spans[k]), np.flatnonzero(place == k)) for k in np.unique(place)]

    @property
    def needs(self) -> Needs:
        s = self.settings
        bundle = 1 if s.risk is None else s.risk.bundle
        return Needs(
            stochastic_sampler=True,
            groups=s.fan == 1,
            bundle=bundle,
            reference=s.kl > 0,
            anchored=s.kl > 0,
            apart=s.window_by == "prompt",
            differentiable_reward=s.last_step is not None,
        )

    def credit(self, tree: Tree, scores: Scores, prompts: Prompts) -> Credit:
        """The leaf's group-relative advantage, the same on every edge that leads to it; 0 between best and worst with `keep`."""
        s, group = self.settings, prompts.group[tree.leaf_root]
        (advantage,) = merged(
            scores, group, s, lambda _, reward, rounding: [self._advantage(reward, group, scores.valid, rounding)]
        )
        if s.keep is not None:
            advantage = ops.advantages.extremes(advantage, group, scores.valid, s.keep // 2)
        return Credit(ops.advantages.average_to_parents(advantage, tree.parent)[1:])

    def _advantage(self, reward: Floats, group: Integers, valid: NDArray[np.bool_], rounding: float) -> Floats:
        s, compared = self.settings, group
        if s.risk is not None:
            reward, compared, valid = ops.advantages.bundled(reward, group, valid, s.risk.bundle)
            reward = ops.advantages.at_risk(reward, valid, s.risk.low, s.risk.high, s.risk.weight)
        return ops.advantages.group_relative(
            reward, compared, valid, s.scale, s.advantage_limit, baseline=s.baseline, rounding=rounding
        )


def divergence(now: Transition, base: Transition, space: str) -> Tensor:
    """How far each node's step (N_t,) is from the reference's, in predictions or means."""
    if space == "prediction":
        return ops.gaussian.reduce_latent((now.prediction - base.prediction) ** 2, "mean")
    return ops.gaussian.divergence(now.mean, base.mean, now.std, reduce="mean")
