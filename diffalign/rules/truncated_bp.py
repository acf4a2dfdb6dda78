"""Backpropagation of the reward through part of the chain: DRaFT-K (arXiv 2309.17400), AlignProp (arXiv 2310.03739) and kin.

| method | settings |
|---|---|
| DRaFT-K, exact at K = T | depth: K, or all |
| AlignProp | depth: [low, high], noise: true |
| DRaFT-LV | depth: 1, variants: 2 |
| ReFL (arXiv 2304.05977) | judged: [low, high], objective: hinge |
| DRTune (arXiv 2405.00760) | depth: all, detached: true, trained: 3, judged: [low, high] |
| VADER (arXiv 2407.08737) | frames: random |
| FlowBP-Sparse (arXiv 2606.11075) | connect: sparse, depth: all, trained: 4, rescale: 0.5 |
| FlowBP-Bridge | connect: bridge, depth: all, trained: 5, late: 4 |
| FlowBP-Lagrange | connect: lagrange, depth: all, gamma: 0.1 |
| LeapAlign | connect: lagrange, depth: all, order: 1, gamma: 0.3 |
| SRPO (arXiv 2509.06942), its step down | connect: known_noise, objective: hinge, and scoring.contrast |
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from diffalign.errors import UserError
from diffalign.protocols import Loss, Needs, Policy, RewardFunction
from diffalign.rules import _forward as forward
from diffalign.rules import _slope as slopes
from diffalign.rules._pathwise import pulled
from diffalign.rules._rule import Rule
from diffalign.rules._truncated_bp import TruncatedBPSettings
from diffalign.runtime.randomness import Purpose
from diffalign.types import Credit, Plan, Rollout, Schedule, Term

if TYPE_CHECKING:
    from torch import Tensor


class TruncatedBP(Rule):
    """The reward's gradient through the decoder and the last K sampling steps; what came before is sampled without a graph.

    With `judged` the chain ends early, after that many steps, and the reward sees the clean sample implied there.
    """

    name: ClassVar[str] = "truncated_bp"

    Settings = TruncatedBPSettings
    settings: TruncatedBPSettings

    @property
    def needs(self) -> Needs:
        return Needs(groups=self.measures_units, differentiable_reward=True, stochastic_sampler=self.settings.noise)

    def plan(self, schedule: Schedule, update: int, rng: np.random.Generator) -> Plan:
        """Sample without a graph to where the gradient begins; the rest is the term's. The last step is never noisy."""
        s, steps = self.settings, schedule.steps
        low, high = s.range(steps)
        if s.connect == "known_noise":
            end = int(rng.integers(*(s.judged or (1, steps)), endpoint=True))
            term = Term(end - 1, end, "reward", draw=int(rng.integers(1, 2**62)))
            return Plan(steps, (False,) * steps, ((term,),))
        if s.connect != "chain":
            if s.connect == "lagrange" and schedule.prediction != "velocity" and schedule.alpha[steps - low] == 0:
                raise UserError(
                    f"rule.depth: got {s.depth} with rule.connect lagrange and a sampler that begins without signal, where no leap of "
                    f"{schedule.prediction} is defined; allowed is less than sampler.steps ({steps})"
                )
            return self._handed(range(steps - low, steps), rng)
        depth = int(rng.integers(low, high + 1))
        end = steps if s.judged is None else int(rng.integers(s.judged[0], s.judged[1] + 1))
        first = max(0, end - depth)
        noise = (s.noise,) * (steps - 1) + (False,)
        chosen = None if s.trained is None else _spaced(first, end, s.trained, rng)
        weight = 1 / (1 + s.variants)
        draws = rng.integers(1, 2**62, 1 + s.variants) if s.variants or s.frames == "random" else [0]
        terms = tuple(Term(first, end, "reward", weight, chosen, int(draw)) for draw in draws)
        # Variants start from the finished latent.
        return Plan(steps if s.variants else first, noise, (terms,))

    def _handed(self, steps: range, rng: np.random.Generator) -> Plan:
        """Sample to the end, take the reward's slope there, and hand it to drawn steps: the bridge first, for earlier ones wait for it."""
        s = self.settings
        bridge: int | None = None
        if s.connect == "lagrange":
            order, bridge = slopes.leaps(steps, s.order, s.late, rng)
        else:
            order = slopes.drawn(steps, s.trained or len(steps), s.late, rng)
            if s.connect == "bridge":
                bridge = order[int(rng.integers(len(order)))]
        weights = slopes.inverse(order, steps, s.late) if s.weighting == "inverse" else [1.0] * len(order)
        terms = [Term(k, k + 1, "slope", w, keep_slope=k == bridge) for k, w in zip(order, weights, strict=True)]
        terms.sort(key=lambda term: (not term.keep_slope, term.start))
        draw = int(rng.integers(1, 2**62)) if s.frames == "random" else 0
        finished = Term(steps.stop, steps.stop, "reward", draw=draw, keep_slope=True)
        return Plan(steps.stop, (s.noise,) * (steps.stop - 1) + (False,), ((finished, *terms),))

    def _step(self, term: Term, policy: Policy, part: Rollout) -> Loss:
        """<what reaches x[i+1], x[i+1]>: its gradient is that times dx[i+1]/dtheta at the stored x[i]."""
        s, plan = self.settings, part.plan
        a, b = slopes.coefficients(policy, plan)
        chosen = [other.start for other in plan.updates[0] if other.through == "slope"]
        steps = range(plan.stop - s.range(plan.stop)[0], plan.stop)
        scale = slopes.rescaled(a, b, steps, chosen, s.rescale)
        arrived = slopes.reaching(part, term, a, s.gamma, scale)
        x = policy.replay(part, term.start, term.stop).x
        return Loss(scale * (arrived * x).sum(), gap=(x.detach() - part.x[term.stop]).abs().max())

    def _call(self, term: Term, policy: Policy, part: Rollout) -> Loss:
        """<what reaches a leap's end, its part that one network call makes>, at the stored latent."""
        weight, arrived = slopes.reaching_leap(part, policy.schedule, term, self.settings.gamma, self.settings.support)
        step = policy.transition(part, term.start)
        gap = (step.mean.detach() - part.x[term.stop]).abs().max()
        return Loss(weight * (arrived * step.prediction).sum(), gap=gap)

    def _judged(self, term: Term, policy: Policy, part: Rollout) -> Tensor:
        """The clean sample (N, D...) that the reward is to see."""
        s = self.settings
        if s.connect == "known_noise":
            return forward.stepped(policy, part, term.start, term.draw)
        if term != part.plan.updates[0][0]:
            # x_1' = alpha_1 x_0 + sigma_1 e' (DRaFT-LV, arXiv 2309.17400, sec. 4)
            part, _ = forward.renoised(part, policy.schedule, term.start, Purpose.VARIANT, term.draw)
        span = policy.replay(part, term.start, term.stop, term.steps, s.detached)
        return span.x if term.stop == policy.schedule.steps else span.clean

    def loss(self, term: Term, policy: Policy, part: Rollout, credit: Credit | None, reward: RewardFunction) -> Loss:
        """-R(x_0), or max(0, target - R(x_0)), averaged over the part."""
        s = self.settings
        if term.through == "slope":
            return (self._call if s.connect == "lagrange" else self._step)(term, policy, part)
        media = policy.decode(part, self._judged(term, policy, part))
        value = reward(replace(media, pixels=media.pixels[:, _frames(s.frames, media.pixels.shape[1], term.draw)]))
        return pulled(value, s.target)


def _spaced(first: int, stop: int, count: int, rng: np.random.Generator) -> tuple[int, ...]:
    """`count` evenly spaced steps of [first, stop), from a drawn one."""
    apart = (stop - first) // count
    offset = first + int(rng.integers(apart))
    return tuple(offset + apart * k for k in range(count))


def _frames(which: str, count: int, draw: int) -> list[int]:
    """Indices of the frames that are judged."""
    if which == "random":
        return [int(np.random.default_rng(draw).integers(count))]
    if which == "three":
        return sorted({0, count // 2, count - 1})
    return list(range(0, count, 2 if which == "alternate" else 1))
