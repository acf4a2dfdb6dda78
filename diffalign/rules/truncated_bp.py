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
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import BeforeValidator, Field

from diffalign.protocols import Loss, Needs, Policy, RewardFunction
from diffalign.rules import _forward as forward
from diffalign.rules import _slope as slopes
from diffalign.rules._rule import RewardSettings, Rule
from diffalign.runtime.randomness import Purpose
from diffalign.runtime.settings import counts
from diffalign.types import Credit, Plan, Rollout, Schedule, Term

Some = Annotated[int, Field(ge=1)]


def _depth(value: object) -> object:
    """One message for the whole union."""
    pair = isinstance(value, (list, tuple)) and len(value) == 2
    numbers = list(value) if pair else [value]  # type: ignore[call-overload]
    if value == "all" or all(type(number) is int and number >= 1 for number in numbers):
        return tuple(numbers) if pair else value
    raise ValueError("allowed are a whole number from 1, [low, high] of such, or all")


class TruncatedBPSettings(RewardSettings):
    """Keys of `rule:` for truncated_bp."""

    depth: Annotated[Some | tuple[Some, Some] | Literal["all"], BeforeValidator(_depth)] = Field(
        1,
        description="K: steps with gradient; [low, high]: drawn anew every update; all: exact",
        json_schema_extra=counts(1, 5),
    )
    objective: Literal["linear", "hinge"] = Field("linear", description="hinge: rewards above `target` do not pull")
    target: float | None = Field(None, description="of the hinge, in units of the weighted sum", allow_inf_nan=False)
    noise: bool = Field(False, description="sample with the process's noise, as AlignProp does; false: as DRaFT")
    variants: int = Field(
        0,
        ge=0,
        description="the finished latent noised anew to the last step's level so many times (DRaFT-LV); depth 1",
    )
    judged: tuple[int, int] | None = Field(
        None,
        description="[low, high]: steps, drawn anew, after which the implied clean sample is judged; null: all",
    )
    detached: bool = Field(False, description="no gradient through the network's input (DRTune)")
    trained: int | None = Field(
        None,
        ge=1,
        description="so many of the steps with gradient: detached: evenly spaced; sparse, bridge: drawn",
    )
    connect: Literal["chain", "sparse", "bridge"] = Field(
        "chain",
        description="chain: one graph; sparse: the slope to each step alone (FlowBP); bridge: and across one",
    )
    late: float = Field(1.0, ge=0, description="sparse, bridge: steps are drawn in proportion to (step + 1)^late")
    weighting: Literal["none", "inverse"] = Field(
        "none", description="inverse: drawn steps weigh so that their mean over draws is that of all steps; sparse"
    )
    rescale: float = Field(
        0.0, ge=0, le=1, description="sparse, bridge: how much of what steps not drawn would move is made up for"
    )
    gamma: float = Field(0.5, ge=0, le=1, description="of the bridge: how much gradient its network's input carries")
    frames: Literal["all", "random", "three", "alternate"] = Field(
        "all", description="of a video, judged: a random one, first, middle and last, or every other (VADER)"
    )

    def problems(self, steps: int) -> list[str]:
        """What is wrong with these settings for a sampler of `steps` steps."""
        problems = []
        low, high = self.range(steps)
        if not low <= high <= steps:
            given = low if low == high else [low, high]
            problems.append(f"rule.depth: got {given}, allowed is 1 <= low <= high <= sampler.steps ({steps}), or all")
        if self.variants and (self.depth, self.judged, self.detached) != (1, None, False):
            problems.append(
                f"rule.variants: got {self.variants}; allowed with depth 1, without judged and detached, which noise no finished latent"
            )
        if self.judged is not None and not 1 <= self.judged[0] <= self.judged[1] <= steps:
            problems.append(
                f"rule.judged: got {list(self.judged)}, allowed is 1 <= low <= high <= sampler.steps ({steps})"
            )
        elif self.judged is not None and self.depth != "all" and high > self.judged[0]:
            problems.append(
                f"rule.depth: got {high}, allowed is up to the least of rule.judged ({self.judged[0]}), or all"
            )
        if self.trained is not None and not self.detached and self.connect == "chain":
            problems.append(
                f"rule.trained: got {self.trained} without rule.detached; allowed is null, or detached: true, or another rule.connect"
            )
        elif self.trained is not None and self.trained > (
            least := low if self.judged is None else min(low, self.judged[0])
        ):
            problems.append(
                f"rule.trained: got {self.trained}, allowed is up to the least steps with gradient ({least})"
            )
        if (self.objective == "hinge") != (self.target is not None):
            problems.append(
                f"rule.target: got {self.target} with objective {self.objective}; a hinge has a target, linear none"
            )
        if self.floors and self.objective == "hinge":
            problems.append(
                f"rule.floors: got {self.floors} with objective hinge, whose target is a value of the weighted sum, and multipliers "
                "change what is summed; allowed is objective: linear"
            )
        return [*problems, *self._unconnected(low)]

    def _unconnected(self, depth: int) -> list[str]:
        """What does not go with how the gradient gets to the steps."""
        drawing = ("late", "weighting", "rescale")
        if self.connect == "chain":
            return self.idle((*drawing, "gamma"), "rule.connect: sparse or bridge")
        here, problems = f"with rule.connect {self.connect}", []
        if isinstance(self.depth, tuple):
            problems.append(
                f"rule.depth: got {list(self.depth)} {here}, which draws steps itself; allowed is a number, or all"
            )
        if self.judged is not None:
            problems.append(
                f"rule.judged: got {list(self.judged)} {here}, whose slope is that of finished samples; allowed is null"
            )
        if self.variants:
            problems.append(
                f"rule.variants: got {self.variants} {here}, whose steps start from stored latents; allowed is 0"
            )
        if self.detached:
            problems.append(
                f"rule.detached: got true {here}; allowed is false, for sparse is just that, and bridge is not"
            )
        if self.trained in (None, depth):
            problems += self.idle(drawing, "rule.trained, fewer steps than have gradient")
        if self.weighting == "inverse" and self.rescale:
            problems.append(
                f"rule.rescale: got {self.rescale:g} with rule.weighting inverse, which makes up for all; allowed is 0"
            )
        if self.connect == "sparse":
            return [*problems, *self.idle(("gamma",), "rule.connect: bridge")]
        if self.weighting == "inverse":
            problems.append(
                "rule.weighting: got inverse with rule.connect bridge, for which no sum of all steps is defined; allowed is none"
            )
        if (self.trained or depth) < 2:
            problems.append(
                f"rule.trained: got {self.trained} with rule.depth {self.depth}; a bridge takes two steps, allowed is 2 or more of both"
            )
        return problems

    def range(self, steps: int) -> tuple[int, int]:
        """Smallest and largest K."""
        if self.depth == "all":
            return steps, steps
        return (self.depth, self.depth) if isinstance(self.depth, int) else self.depth


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
        if s.connect != "chain":
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
        order = slopes.drawn(steps, s.trained or len(steps), s.late, rng)
        weights = slopes.inverse(order, steps, s.late) if s.weighting == "inverse" else [1.0] * len(order)
        bridge = order[int(rng.integers(len(order)))] if s.connect == "bridge" else None
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

    def loss(self, term: Term, policy: Policy, part: Rollout, credit: Credit | None, reward: RewardFunction) -> Loss:
        """-R(x_0), or max(0, target - R(x_0)), averaged over the part."""
        s = self.settings
        if term.through == "slope":
            return self._step(term, policy, part)
        if term != part.plan.updates[0][0]:
            # x_1' = alpha_1 x_0 + sigma_1 e' (DRaFT-LV, arXiv 2309.17400, sec. 4)
            part, _ = forward.renoised(part, policy.schedule, term.start, Purpose.VARIANT, term.draw)
        span = policy.replay(part, term.start, term.stop, term.steps, s.detached)
        media = policy.decode(part, span.x if term.stop == policy.schedule.steps else span.clean)
        value = reward(replace(media, pixels=media.pixels[:, _frames(s.frames, media.pixels.shape[1], term.draw)]))
        if s.target is None:
            return Loss(-value.mean())
        below = (s.target - value).clamp(min=0)
        return Loss(below.mean(), {"below_target": (below > 0).double().mean().detach()})


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
