"""Floors: rewards that are kept above a least while others go up, by Lagrange multipliers (primal-dual, arXiv 2508.19104)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from diffalign.types import Floats

KEPT = 0.9  # of running means, per update
PATIENCE = 10  # updates at the cap after which it is said that a floor does not hold


@dataclass(frozen=True)
class Floor:
    """What was found out about a reward that has a floor.

    multiplier: mu >= 0, its further weight in the total; mean, std: running ones of updates' means and population standard deviations, None
    before the first; stuck: updates in a row below the floor with the multiplier at its cap, for good once they are `PATIENCE`.
    """

    multiplier: float = 0.0
    mean: float | None = None
    std: float | None = None
    stuck: int = 0

    def after(self, values: Floats, least: float, rate: float, cap: float) -> Floor:
        """After an update with these scores (N,): mu <- min(cap, max(0, mu + rate (least - m) / std)).

        Scores that are not finite do not count, nor does their order. A reward that never differed has no std: mu stays.
        """
        given = values[np.isfinite(values)]
        if not len(given):
            return self
        # Sums are exact, so that it does not matter which process has which sample.
        own = math.fsum(given) / len(given)
        apart = math.sqrt(math.fsum((given - own) ** 2) / len(given))
        mean, std = _running(self.mean, own), _running(self.std, apart)
        step = rate * (least - mean) / std if std > 0 else 0.0
        multiplier = min(cap, max(0.0, self.multiplier + step))
        below = self.stuck + 1 if multiplier == cap and mean < least else 0
        return Floor(multiplier, mean, std, self.stuck if self.stuck >= PATIENCE else below)


def _running(before: float | None, now: float) -> float:
    return now if before is None else KEPT * before + (1 - KEPT) * now
