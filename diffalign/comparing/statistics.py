"""What seeds say of methods: gains, differences of pairs, and what a score costs. Pure functions of arrays.

Over seeds, with the evaluation's prompts and noises fixed: Student's t over what each seed gave, paired where two methods have the same
seeds. So an interval says what other seeds would give on the same prompts. tests/comparing/test_statistics.py simulates what it covers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

from diffalign.evaluation.intervals import FEW, Interval
from diffalign.types import Floats, Integers

LEVEL, POWER = 0.05, 0.8
RESAMPLES = 2000


@dataclass(frozen=True)
class Difference:
    """Of two methods, the first's less the second's, over seeds that both have.

    value: with its 95 % interval over seeds, none with fewer than two; p: two-sided, of equal means; half: of the interval, the smallest
    difference that this many seeds tell apart from none; found: the smallest that they would tell apart in four of five comparisons. NaN
    where there are too few seeds.
    """

    value: Interval
    seeds: int
    p: float = math.nan
    half: float = math.nan
    found: float = math.nan


def over_seeds(values: Floats) -> Interval:
    """The mean of what seeds gave (S,), with Student's interval; none with fewer than two seeds, or where all gave the same."""
    values = values[np.isfinite(values)]
    if not len(values):
        return Interval(math.nan)
    value, error = float(values.mean()), _error(values)
    if not error > 0:
        return Interval(value)
    half = float(stats.t.ppf(1 - LEVEL / 2, len(values) - 1)) * error
    return Interval(value, value - half, value + half)


def _error(values: Floats) -> float:
    """Of a mean; NaN where there is one value, 0 where they are equal to rounding."""
    if len(values) < 2:
        return math.nan
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    return 0.0 if error <= 1e-12 * float(np.abs(values).max()) else error


def over_prompts(change: Floats, prompt: Integers) -> Interval:
    """The mean of changes (S, n) of n images whose prompts are (n,) ids, and what other prompts would give with the same seeds: the
    bias-corrected accelerated bootstrap of scipy over prompts, always with the same draws."""
    means = by_prompt(change, prompt)
    value = float(np.nanmean(change)) if np.isfinite(change).any() else math.nan
    if len(means) < FEW or not np.ptp(means) > 0:
        return Interval(value)
    found = stats.bootstrap(
        (means,), np.mean, n_resamples=RESAMPLES, method="BCa", rng=np.random.default_rng(0)
    ).confidence_interval
    return Interval(value, float(found.low), float(found.high))


def by_prompt(change: Floats, prompt: Integers) -> Floats:
    """The mean of each prompt's changes (P,), over seeds (S, n) and images alike; without those that have no score."""
    names, index = np.unique(prompt, return_inverse=True)
    known = np.isfinite(change)
    sums = np.bincount(index, np.where(known, change, 0.0).sum(0), len(names))
    counts = np.bincount(index, known.sum(0).astype(np.float64), len(names))
    return sums[counts > 0] / counts[counts > 0]


def difference(own: Floats, other: Floats) -> Difference:
    """Of two methods' scores by seed (S,), the same seeds in both."""
    apart = own - other
    apart = apart[np.isfinite(apart)]
    value, seeds = over_seeds(apart), len(apart)
    error = _error(apart)
    if not error > 0:
        return Difference(value, seeds)
    p = 2 * float(stats.t.sf(abs(value.value) / error, seeds - 1))
    half = float(stats.t.ppf(1 - LEVEL / 2, seeds - 1)) * error
    return Difference(value, seeds, p, half, power_shift(seeds) * error)


def power_shift(seeds: int) -> float:
    """How many standard errors a true difference must be so that it is told apart from none in `POWER` of comparisons of so many seeds."""
    freedom = seeds - 1
    edge = float(stats.t.ppf(1 - LEVEL / 2, freedom))

    def short(shift: float) -> float:
        return float(stats.nct.sf(edge, freedom, shift)) - POWER

    return float(optimize.brentq(short, 0.0, 4 * edge + 4))


def holm(p: Sequence[float]) -> list[float]:
    """P-values of several tests, so that none is wrongly below `LEVEL` in 95 % of families (Holm 1979); NaN stays and does not count."""
    values = np.asarray(p, np.float64)
    known = np.flatnonzero(np.isfinite(values))
    order = known[np.argsort(values[known], kind="stable")]
    values[order] = np.minimum(1.0, np.maximum.accumulate(values[order] * np.arange(len(order), 0, -1)))
    return [float(value) for value in values]


def reached(spent: Sequence[float], score: Sequence[float], target: float) -> float | None:
    """What had been spent where a curve first reaches a score, on straight lines between evaluations; None if it never does."""
    for k, value in enumerate(score):
        if value >= target:
            if not k:
                return float(spent[0])
            share = (target - score[k - 1]) / (value - score[k - 1])
            return float(spent[k - 1] + share * (spent[k] - spent[k - 1]))
    return None


@dataclass(frozen=True)
class Cost:
    """Of a score, over the units of a method: how many reach it, and the median and the range of what those spent; None where none does."""

    units: int
    reached: int
    median: float | None = None
    least: float | None = None
    most: float | None = None


def cost(spent: Sequence[float | None]) -> Cost:
    """From what every unit spent, None for those that never reached it. The median is over all units, those that never did above all."""
    found = sorted(value for value in spent if value is not None)
    if not found:
        return Cost(len(spent), 0)
    median = float(np.median([*found, *[math.inf] * (len(spent) - len(found))]))
    return Cost(len(spent), len(found), median if math.isfinite(median) else None, found[0], found[-1])
