"""What M independent gradients g_i and references G_i say about E[g] and E[G], from their inner products alone.

The squared norm of a mean of noisy vectors is never 0, even where the expectation is. Split the vectors into two halves: the
inner product of the halves' means has no such bias. Averaged over all splits it is the mean of <d_i, d_j> over i != j.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from scipy import stats

from diffalign.evaluation.intervals import Interval
from diffalign.types import Floats


def quantile(count: int) -> float:
    """97.5 % point of Student's t for `count` gradients."""
    return float(stats.t.ppf(0.975, count - 1))


@dataclass(frozen=True)
class Products:
    """Inner products (M, M): rule[i, j] = <g_i, g_j>, reference[i, j] = <G_i, G_j>, cross[i, j] = <g_i, G_j>, and
    difference[i, j] = <d_i, d_j> of d = g - G."""

    rule: Floats
    reference: Floats
    cross: Floats
    difference: Floats

    @classmethod
    def of(cls, rule: Floats, reference: Floats) -> Products:
        """Of gradients (M, P) each."""
        apart = rule - reference  # from itself, as equal gradients must be exactly 0 apart
        return cls(rule @ rule.T, reference @ reference.T, rule @ reference.T, apart @ apart.T)

    def without(self, k: int) -> Products:
        """All but the k-th of both."""
        return Products(*(np.delete(np.delete(getattr(self, f.name), k, 0), k, 1) for f in fields(self)))


def off_diagonal_mean(matrix: Floats) -> float:
    """Mean over i != j: unbiased for the inner product of the expectations."""
    count = len(matrix)
    return float((matrix.sum() - np.trace(matrix)) / (count * (count - 1)))


def squared_norm(products: Floats) -> Interval:
    """||E[d]||^2 from <d_i, d_j> (M, M), M > 2, with its interval.

    A U-statistic of order two; its variance is 4 zeta_1 / M + 2 zeta_2 / (M (M - 1)) (Hoeffding 1948), where zeta_1, the
    variance of a row's expectation, is 0 if E[d] is, and zeta_2 that of a single product given the rows.
    """
    count = len(products)
    value = off_diagonal_mean(products)
    off = products[~np.eye(count, dtype=bool)]
    rows = (products.sum(1) - np.diag(products)) / (count - 1)
    total = float(off.var())
    between = max(0.0, float(rows.var(ddof=1)) - total / (count - 1))
    within = max(0.0, total - 2 * between)
    half = quantile(count) * np.sqrt(4 * between / count + 2 * within / (count * (count - 1)))
    return Interval(value, value - half, value + half)


def relative_bias(products: Products) -> Interval:
    """||E[g] - E[G]|| / ||E[G]||; the root keeps its sign, so that an interval around 0 reaches below it.

    Not a number where E[G] is not told apart from 0: then more gradients are needed.
    """
    scale = off_diagonal_mean(products.reference)
    if not scale > 0:
        return Interval(np.nan, np.nan, np.nan)
    squared = squared_norm(products.difference)
    return Interval(*(float(np.sign(v) * np.sqrt(abs(v) / scale)) for v in (squared.value, squared.low, squared.high)))


def cosine(products: Products) -> Interval:
    """cos(E[g], E[G]) with a jackknife interval; not a number where E[g] is not told apart from 0."""

    def of(given: Products) -> float:
        squares = [off_diagonal_mean(given.rule), off_diagonal_mean(given.reference)]
        return off_diagonal_mean(given.cross) / float(np.sqrt(np.prod(squares))) if min(squares) > 0 else float("nan")

    count, value = len(products.rule), of(products)
    left_out = np.array([of(products.without(k)) for k in range(count)])
    half = quantile(count) * np.sqrt((count - 1) * left_out.var())
    # Free of noise's shrinking, an estimate may overshoot what a cosine can be.
    return Interval(*(float(np.clip(v, -1, 1)) for v in (value, value - half, value + half)))


def variance(products: Floats) -> float:
    """Trace of the covariance of d from <d_i, d_j>."""
    count = len(products)
    return float(np.trace(products) / count - off_diagonal_mean(products))


def signal_to_noise(products: Floats) -> float:
    """||E[g]||^2 / trace of the covariance, 0 where E[g] is not told apart from 0."""
    spread = variance(products)
    return max(0.0, off_diagonal_mean(products)) / spread if spread > 0 else float("inf")
