"""Means and paired gains with 95 % intervals over prompts. Pure functions of arrays; NaN, samples without a score, are left out.

Samples of one prompt are alike, so prompts are what is counted. With fewer than 8 of them nothing covers what it claims, and there is no
interval. tests/evaluation/test_intervals.py simulates what each covers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from diffalign.types import Floats, Integers

Z = float(stats.norm.ppf(0.975))
FEW = 8  # prompts below which there is no interval
FEW_WORDS = "too few prompts for an interval"


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % interval; None, None where there is none."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def ends(self) -> tuple[float, float] | None:
        """The interval, if there is one."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return self.ends is not None

    def text(self, form: str = ".3f") -> str:
        """As it is printed, everywhere; where all of it would be nothing but zeros, with two figures."""
        largest = max(map(abs, (self.value, *(self.ends or ()))))
        if form.endswith("3f") and 0 < largest < 0.0095:
            form = form.replace(".3f", f".{1 - math.floor(math.log10(largest))}f")
        value, ends = format(self.value, form), self.ends
        return f"{value} ({FEW_WORDS})" if ends is None else f"{value} [{ends[0]:{form}}, {ends[1]:{form}}]"

    def facts(self) -> dict[str, float | None]:
        """As JSON files have it; null where there is no interval."""
        return {"mean": self.value, "low": self.low, "high": self.high}

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Interval:
        """From what `facts` gave."""
        return cls(facts["mean"], facts["low"], facts["high"])


NONE = Interval(math.nan)


def mean(values: Floats, prompt: Integers) -> Interval:
    """The mean over samples (n,) whose prompts are (n,) ids: Wilson's interval for verdicts (all 0 or 1), else Hall's."""
    values, prompt = _scored(values, prompt)
    return wilson(values, prompt) if _verdicts(values) else hall(values, prompt)


def gain(after: Floats, before: Floats, prompt: Integers) -> Interval:
    """The mean of `after - before`, pairs (n,) of samples from the same noise: Bonett and Price's interval where both are verdicts, else
    Hall's."""
    both = np.isfinite(after) & np.isfinite(before)
    after, before, prompt = after[both], before[both], prompt[both]
    pairs = _verdicts(after) and _verdicts(before)
    return bonett_price(after - before, prompt) if pairs else hall(after - before, prompt)


def _scored(values: Floats, prompt: Integers) -> tuple[Floats, Integers]:
    finite = np.isfinite(values)
    return np.asarray(values[finite], np.float64), prompt[finite]


def _verdicts(values: Floats) -> bool:
    return bool(len(values) and np.isin(values, (0.0, 1.0)).all())


def hall(values: Floats, prompt: Integers) -> Interval:
    """Student's t over prompts, freed of skewness by a cubic transformation (Hall 1992, J. R. Stat. Soc. B 54, 221).

    T = W + a W^2 / sqrt(k) + a^2 W^3 / (3 k) + g / (6 sqrt(k)), a = g / 3, with W = (mean - mu) / s of k prompts' means and their
    skewness g, is nearly Student's: mu lies between mean - s W(t) and mean - s W(-t). No interval where all prompts' means are equal:
    nothing is known of their spread.
    """
    values, prompt = _scored(values, prompt)
    if not len(values):
        return NONE
    _, index = np.unique(prompt, return_inverse=True)
    counts = np.bincount(index).astype(np.float64)
    count, value = len(counts), float(values.mean())
    # Of the mean over samples, where prompts may have unequal numbers: a ratio, linearised.
    apart = np.bincount(index, values - value) * count / counts.sum()
    spread = float(apart.std(ddof=1)) if count > 1 else 0.0
    if count < FEW or spread <= 1e-12 * max(abs(value), float(np.abs(values).max())):
        return Interval(value)
    g = stats.skew(apart, bias=False)
    root, t = math.sqrt(count), float(stats.t.ppf(0.975, count - 1))

    def inverse(point: float) -> float:
        moved, a = point - g / (6 * root), g / 3
        return moved if abs(a) < 1e-9 else root / a * (np.cbrt(1 + 3 * a / root * moved) - 1)

    return Interval(value, value - spread / root * float(inverse(t)), value - spread / root * float(inverse(-t)))


def wilson(values: Floats, prompt: Integers) -> Interval:
    """Wilson's score interval of verdicts at the effective number of samples, n / (1 + (m - 1) rho), with Student's t over prompts.

    p +- around (p + t^2 / 2n) / (1 + t^2 / n); m samples a prompt with intraclass correlation rho are worth fewer than n independent
    ones (Kish's design effect).
    """
    n, t = effective(values, prompt)
    p = float(values.mean())
    if not n:
        return Interval(p)
    centre = (p + t**2 / (2 * n)) / (1 + t**2 / n)
    half = t * math.sqrt(p * (1 - p) / n + t**2 / (4 * n**2)) / (1 + t**2 / n)
    # By rounding alone the ends miss p where all verdicts are one.
    return Interval(p, 0.0 if p == 0 else min(p, centre - half), 1.0 if p == 1 else max(p, centre + half))


def bonett_price(change: Floats, prompt: Integers) -> Interval:
    """The mean of paired verdicts' changes (-1, 0, 1) with one more pair for each way (Bonett and Price 2012, J. Educ. Behav. Stat. 37).

    a = (up + 1) / (n + 2), b = (down + 1) / (n + 2): a - b +- t sqrt((a + b - (a - b)^2) / (n + 2)), at the effective number of pairs n. So
    pairs that are all equal do not claim that nothing changes.
    """
    n, t = effective(change, prompt)
    value = float(change.mean())
    if not n:
        return Interval(value)
    up, down = (float((change == sign).mean() * n + 1) / (n + 2) for sign in (1, -1))
    middle, half = up - down, t * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return Interval(value, max(-1.0, min(value, middle - half)), min(1.0, max(value, middle + half)))


def effective(values: Floats, prompt: Integers) -> tuple[float, float]:
    """How many independent samples some are worth, and the quantile that belongs to it; 0 where there are too few prompts.

    Where fewer than 8 prompts have anything but the commonest value, likeness within prompts cannot be told, and each counts once.
    """
    names, index = np.unique(prompt, return_inverse=True)
    if len(names) < FEW:
        return 0.0, math.nan
    kinds, kind = np.unique(values, return_inverse=True)
    commonest = kinds[np.bincount(kind).argmax()]
    if len(np.unique(index[values != commonest])) < FEW:
        return float(len(names)), Z
    return len(values) / design_effect(values, prompt), float(stats.t.ppf(0.975, len(names) - 1))


def design_effect(values: Floats, prompt: Integers) -> float:
    """1 + (m - 1) rho, rho from the one-way analysis of variance, at least 1; prompts may have unequal numbers of samples."""
    names, index = np.unique(prompt, return_inverse=True)
    n, k = len(values), len(names)
    if k < 2 or n == k:
        return 1.0
    counts = np.bincount(index).astype(float)
    means = np.bincount(index, values) / counts
    between = float((counts * (means - values.mean()) ** 2).sum() / (k - 1))
    within = float(((values - means[index]) ** 2).sum() / (n - k))
    m = (n - float((counts**2).sum()) / n) / (k - 1)
    spread = between + (m - 1) * within
    rho = (between - within) / spread if spread > 0 else 1.0  # all equal: they may be one sample each
    return float(max(1.0, 1 + (m - 1) * rho))


def mean_of_means(values: Floats, prompt: Integers, task: Integers) -> Interval:
    """The mean of the tasks' means, GenEval's overall score: Student's t with the tasks' variances over prompts added up.

    Degrees of freedom are Satterthwaite's. No interval where a task has fewer than two prompts, or all together fewer than 8.
    """
    finite = np.isfinite(values)
    values, prompt, task = values[finite], prompt[finite], task[finite]
    verdicts = bool(np.isin(values, (-1.0, 0.0, 1.0)).all())
    names = np.unique(task)
    parts = [(values[task == name], prompt[task == name]) for name in names]
    value = float(np.mean([own.mean() for own, _ in parts])) if parts else math.nan
    prompts = np.array([len(np.unique(ids)) for _, ids in parts])
    if not parts or prompts.min() < 2 or prompts.sum() < FEW:
        return Interval(value)
    spreads = np.array([_variance(own, ids, verdicts) for own, ids in parts]) / len(parts) ** 2
    total = float(spreads.sum())
    if total <= 0:
        return Interval(value)
    freedom = total**2 / float((spreads**2 / (prompts - 1)).sum())
    half = float(stats.t.ppf(0.975, freedom)) * math.sqrt(total)
    return Interval(value, value - half, value + half)


def _variance(values: Floats, prompt: Integers, verdicts: bool) -> float:
    """Of the mean of one task's samples, over its prompts; of verdicts at least as much as with one more each way."""
    _, index = np.unique(prompt, return_inverse=True)
    counts = np.bincount(index).astype(np.float64)
    apart = np.bincount(index, values - values.mean()) * len(counts) / counts.sum()
    found = float(apart.var(ddof=1)) / len(counts)
    if not verdicts:
        return found
    n = len(values) / design_effect(values, prompt)
    if (values < 0).any():  # changes of verdicts
        up, down = (float((values == sign).mean() * n + 1) / (n + 2) for sign in (1, -1))
        return max(found, (up + down - (up - down) ** 2) / (n + 2))
    p = (float(values.mean()) * n + 1) / (n + 2)
    return max(found, p * (1 - p) / (n + 2))
