"""Settings of truncated_bp, and which of them go together."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from diffalign.rules._rule import RewardSettings
from diffalign.runtime.settings import counts

Some = Annotated[int, Field(ge=1)]
# Keys of how the gradient gets to the steps, and the values of `connect` that use them.
CONNECTING = {
    "late": ("sparse", "bridge", "lagrange"),
    "weighting": ("sparse", "bridge"),
    "rescale": ("sparse", "bridge"),
    "gamma": ("bridge", "lagrange"),
    "order": ("lagrange",),
    "support": ("lagrange",),
}


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
    connect: Literal["chain", "sparse", "bridge", "lagrange", "known_noise"] = Field(
        "chain", description="chain: one graph; sparse, bridge, lagrange: FlowBP; known_noise: SRPO"
    )
    late: float = Field(
        1.0, ge=0, description="sparse, bridge, lagrange: steps are drawn in proportion to (step + 1)^late"
    )
    weighting: Literal["none", "inverse"] = Field(
        "none", description="inverse: drawn steps weigh so that their mean over draws is that of all steps; sparse"
    )
    rescale: float = Field(
        0.0, ge=0, le=1, description="sparse, bridge: how much of what steps not drawn would move is made up for"
    )
    gamma: float = Field(
        0.5,
        ge=0,
        le=1,
        description="bridge, lagrange: how much gradient the input of the network carries that others wait for",
    )
    order: int = Field(3, ge=1, le=8, description="lagrange: at most so many network calls, evenly spread, make a leap")
    support: float = Field(
        0.25, ge=0, le=1, description="lagrange: how much gradient a leap's network calls after its first carry"
    )
    frames: Literal["all", "random", "three", "alternate"] = Field(
        "all", description="of a video, judged: a random one, first, middle and last, or every other (VADER)"
    )

    def problems(self, steps: int) -> list[str]:
        """What is wrong with these settings for a sampler of `steps` steps."""
        problems = super().problems(steps)
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
        idle = [
            problem
            for key, used in CONNECTING.items()
            if self.connect not in used
            for problem in self.idle((key,), f"rule.connect: {' or '.join(used)}")
        ]
        if self.connect == "chain":
            return idle
        if self.connect == "known_noise":
            own = ("depth", "noise", "variants", "detached", "trained")
            return [*idle, *self.idle(own, "a rule.connect other than known_noise, which takes one step without noise")]
        here, problems = f"with rule.connect {self.connect}", idle
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
                f"rule.detached: got true {here}; allowed is false, for sparse is just that, and others are not"
            )
        return [*problems, *(self._unleapt(depth, here) if self.connect == "lagrange" else self._undrawn(depth))]

    def _undrawn(self, depth: int) -> list[str]:
        """What does not go with steps that are drawn one by one."""
        problems = []
        if self.trained in (None, depth):
            problems += self.idle(("late", "weighting", "rescale"), "rule.trained, fewer steps than have gradient")
        if self.weighting == "inverse" and self.rescale:
            problems.append(
                f"rule.rescale: got {self.rescale:g} with rule.weighting inverse, which makes up for all; allowed is 0"
            )
        if self.connect == "sparse":
            return problems
        if self.weighting == "inverse":
            problems.append(
                "rule.weighting: got inverse with rule.connect bridge, for which no sum of all steps is defined; allowed is none"
            )
        if (self.trained or depth) < 2:
            problems.append(
                f"rule.trained: got {self.trained} with rule.depth {self.depth}; a bridge takes two steps, allowed is 2 or more of both"
            )
        return problems

    def _unleapt(self, depth: int, here: str) -> list[str]:
        """What does not go with two leaps."""
        problems = []
        if self.noise:
            problems.append(
                f"rule.noise: got true {here}, whose leaps solve the equation of a sampler without noise; allowed is false"
            )
        if self.trained is not None:
            problems.append(
                f"rule.trained: got {self.trained} {here}, where rule.order says how many calls make a leap; allowed is null"
            )
        if depth < 2:
            problems.append(
                f"rule.depth: got {self.depth} {here}; two leaps take two steps, allowed is 2 or more, or all"
            )
        return problems

    def range(self, steps: int) -> tuple[int, int]:
        """Smallest and largest K."""
        if self.depth == "all":
            return steps, steps
        return (self.depth, self.depth) if isinstance(self.depth, int) else self.depth
