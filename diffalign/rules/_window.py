"""Which steps of an update are noisy: a window of the sampler's, or some of it at a time, of all prompts or of each."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from diffalign.rules._merging import MergeSettings
from diffalign.types import Integers


class WindowSettings(MergeSettings):
    """Keys of the window."""

    window: tuple[int, int] | None = Field(None, description="first and one past the last noisy step; null: all")
    window_steps: int | None = Field(None, ge=1, description="so many steps of the window at a time; null: all of it")
    window_move: Literal["random", "sliding"] = Field(
        "random", description="where they begin: drawn for every update (Flow-GRPO-Fast), or moving on (MixGRPO)"
    )
    window_every: int = Field(25, ge=1, description="updates before a sliding one moves on by a step")

    def problems(self, steps: int) -> list[str]:
        """What is wrong with these settings for a sampler of `steps` steps."""
        problems, (first, stop) = super().problems(steps), self.window or (0, steps)
        if not (0 <= first < stop <= steps and first < steps - 1):
            given, rule = [first, stop], "0 <= first < stop <= sampler.steps"
            return [
                *problems,
                f"rule.window: got {given}, allowed is {rule} ({steps}), first before the last step, which has no noise",
            ]
        if self.window_steps is None:
            return [*problems, *self.idle(("window_move", "window_every"), "rule.window_steps")]
        most = min(stop, steps - 1) - first
        many = f"rule.window_steps: got {self.window_steps}, allowed is up to the window's noisy steps ({most})"
        return [*problems, *([many] if self.window_steps > most else [])]

    def candidates(self, steps: int) -> tuple[int, int]:
        """First and one past the last step that may be noisy; the sampler's last step is never among them."""
        first, stop = self.window or (0, steps)
        return first, min(stop, steps - 1)

    def spans(self, steps: int) -> list[tuple[int, int]]:
        """First and one past the last noisy step of an update, for every place that the window may have."""
        first, stop = self.candidates(steps)
        length = self.window_steps or stop - first
        return [(k, k + length) for k in range(first, stop - length + 1)]

    def span(self, steps: int, update: int, rng: np.random.Generator) -> tuple[int, int]:
        """Of these an update's."""
        spans = self.spans(steps)
        if self.window_steps is None:
            return spans[0]
        # MixGRPO's own schedule shrinks at the end and has an empty window; this one wraps with its full length.
        moved = rng.integers(len(spans)) if self.window_move == "random" else update // self.window_every % len(spans)
        return spans[int(moved)]


def spread_out(count: int, places: int, rng: np.random.Generator) -> Integers:
    """(count,) a place in [0, places) for each, all equally likely: one from each of `count` equal stretches of them, in random order, so
    that no two places are taken by numbers that differ by more than 2."""
    within = (rng.permutation(count) + rng.random(count)) / count
    return np.minimum((within * places).astype(np.int64), places - 1)


def evenly(start: int, stop: int, share: float) -> tuple[int, ...]:
    """That share of the steps [start, stop), evenly spaced from `start` on; one at least."""
    count = max(1, round(share * (stop - start)))
    return tuple(start + k * (stop - start) // count for k in range(count))
