"""Means with 95 % intervals that know which samples belong to one prompt. Pure functions of arrays."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from diffalign.types import Floats, Integers

Z = float(stats.norm.ppf(0.975))
THUMBNAIL = 16  # pixels a side


def mean(values: Floats, prompt: Integers) -> Interval:
    """Wilson's interval for verdicts (all 0 or 1), else a bootstrap over prompts; NaN are left out."""
    finite = np.isfinite(values)
    values, prompt = values[finite], prompt[finite]
    if len(values) and np.isin(values, (0.0, 1.0)).all():
        return wilson(values, prompt)
    return interval(values, prompt)


def wilson(values: Floats, prompt: Integers) -> Interval:
    """Wilson's score interval at the effective number of samples, n / (1 + (m - 1) rho).

    p +- around (p + z^2 / 2n) / (1 + z^2 / n); m samples a prompt with intraclass correlation rho are worth fewer than n independent
    ones (Kish's design effect).
    """
    n = len(values) / design_effect(values, prompt)
    p = float(values.mean())
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * np.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    return Interval(p, float(centre - half), float(centre + half))


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
    rho = (between - within) / spread if spread > 0 else 0.0
    return float(max(1.0, 1 + (m - 1) * rho))


def mean_of_means(values: Floats, prompt: Integers, task: Integers, resamples: int = 2000, seed: int = 0) -> Interval:
    """The mean of the tasks' means, GenEval's overall score, with a bootstrap over prompts within every task."""
    rng = np.random.default_rng(seed)
    finite = np.isfinite(values)
    values, prompt, task = values[finite], prompt[finite], task[finite]
    drawn, exact = np.zeros(resamples), 0.0
    names = np.unique(task)
    for name in names:
        own = task == name
        _, index = np.unique(prompt[own], return_inverse=True)
        sums, counts = np.bincount(index, values[own]), np.bincount(index).astype(float)
        picks = rng.integers(len(sums), size=(resamples, len(sums)))
        drawn += sums[picks].sum(1) / counts[picks].sum(1) / len(names)
        # Added up as the resamples are: where a task has one prompt, and all of them are equal, so is this, to the last bit.
        exact += float(sums.sum() / counts.sum() / len(names))
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Interval(exact, float(low), float(high))


def thumbnails(frames: NDArray[np.uint8]) -> Floats:
    """Samples (n, F, H, W, 3) as (n, F * 16 * 16 * 3) means of blocks, in [0, 1]."""
    n, _, h, w, _ = frames.shape
    rows, columns = (np.linspace(0, size, min(size, THUMBNAIL) + 1).astype(int)[:-1] for size in (h, w))
    sums = np.add.reduceat(np.add.reduceat(frames.astype(np.float64), rows, axis=2), columns, axis=3)
    area = np.diff([*rows, h])[:, None, None] * np.diff([*columns, w])[None, :, None]
    return (sums / area / 255).reshape(n, -1)


def diversity(pictures: Floats, prompt: Integers) -> Floats:
    """(n,) each sample's mean distance (root mean square) to the others of its prompt, NaN where it is alone."""
    distances, counts = np.zeros(len(pictures)), np.zeros(len(pictures))
    for name in np.unique(prompt):
        for a, b in combinations(np.flatnonzero(prompt == name), 2):
            apart = np.sqrt(np.mean((pictures[a] - pictures[b]) ** 2))
            distances[[a, b]] += apart
            counts[[a, b]] += 1
    return np.divide(distances, counts, out=np.full(len(pictures), np.nan), where=counts > 0)


def drift(pictures: Floats, base: Floats) -> Floats:
    """(n,) distance (root mean square) of each sample from the base model's of the same seed."""
    return np.sqrt(np.mean((pictures - base) ** 2, axis=1))


FEW = 8  # with fewer prompts than this, images are resampled instead of prompts


RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    def facts(self) -> dict[str, float]:
        """As JSON files have it."""
        return {"mean": self.value, "low": self.low, "high": self.high}


def interval(values: Floats, group: Integers, seed: int = 0) -> Interval:
    """Mean and 95 % percentile bootstrap over prompts (images where there are fewer than 8 prompts); NaN are left out."""
    finite = np.isfinite(values)
    values, group = values[finite], group[finite]
    if not len(values):
        return Interval(float("nan"), float("nan"), float("nan"))
    names, index = np.unique(group, return_inverse=True)
    if len(names) >= FEW:
        sums: Floats = np.bincount(index, values).astype(np.float64)
        counts: Floats = np.bincount(index).astype(np.float64)
    else:
        sums, counts = values, np.ones(len(values))
    mean = float(values.mean())
    if len(sums) < 2 or np.ptp(sums / counts) == 0:
        return Interval(mean, mean, mean)
    bounds = stats.bootstrap(
        (sums, counts),
        lambda s, c, axis: s.sum(axis) / c.sum(axis),
        paired=True,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean, float(bounds.low), float(bounds.high))
