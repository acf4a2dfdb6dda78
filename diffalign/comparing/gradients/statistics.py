"""What M independent gradients g_i and references G_i say about E[g] and E[G], from their inner products alone.

The squared norm of a mean of noisy vectors is never 0, even where the expectation is. Split the vectors into two halves: the
inner product of the halves' means has no such bias. Averaged over all splits it is the mean of <d_i, d_j> over i != j.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from diffalign.evaluation.intervals import Interval
from diffalign.types import Floats


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


def off_diagonal_mean(matrix: Floats) -> float:
    """Mean over i != j: unbiased for the inner product of the expectations."""
    count = len(matrix)
    return float((matrix.sum() - np.trace(matrix)) / (count * (count - 1)))


def left_out(matrix: Floats) -> Floats:
    """(M,) that mean without each index in turn, M > 2."""
    count, own = len(matrix), np.diag(matrix)
    gone = matrix.sum(0) + matrix.sum(1) - 2 * own
    return (matrix.sum() - own.sum() - gone) / ((count - 1) * (count - 2))


def jackknife(value: float, replicates: Floats) -> Interval:
    """A value with the interval of its M leave-one-out replicates: +- t sqrt((M - 1) var(replicates)) (Arvesen 1969, for U-statistics).

    It covers 95 % where the expectation is large against the noise, and more where it is not. No interval where a replicate is no number.
    """
    count = len(replicates)
    if not (np.isfinite(value) and np.isfinite(replicates).all()):
        return Interval(np.nan)
    half = float(stats.t.ppf(0.975, count - 1)) * float(np.sqrt((count - 1) * replicates.var()))
    return Interval(value, value - half, value + half)


def squared_norm(products: Floats) -> Interval:
    """||E[d]||^2 from <d_i, d_j> (M, M), M > 2, with its interval."""
    return jackknife(off_diagonal_mean(products), left_out(products))


def relative_bias(products: Products) -> Interval:
    """||E[g] - E[G]|| / ||E[G]||; the root keeps its sign, so that an interval around 0 reaches below it.

    Not a number where E[G] is not told apart from 0: then more gradients are needed.
    """
    if not products.difference.any():  # equal, to the last bit
        return Interval(0.0, 0.0, 0.0)
    scale, scales = off_diagonal_mean(products.reference), left_out(products.reference)
    if not min(scale, *scales) > 0:
        return Interval(np.nan)
    found = jackknife(off_diagonal_mean(products.difference) / scale, left_out(products.difference) / scales)
    return Interval(*(float(np.sign(v) * np.sqrt(abs(v))) for v in (found.value, *(found.ends or ()))))


def cosine(products: Products) -> Interval:
    """cos(E[g], E[G]) with its interval; not a number where E[g] or E[G] is not told apart from 0."""
    own, other = ((off_diagonal_mean(m), left_out(m)) for m in (products.rule, products.reference))
    if not min(own[0], *own[1], other[0], *other[1]) > 0:
        return Interval(np.nan)
    value = off_diagonal_mean(products.cross) / float(np.sqrt(own[0] * other[0]))
    found = jackknife(value, left_out(products.cross) / np.sqrt(own[1] * other[1]))
    # Free of noise's shrinking, an estimate may overshoot what a cosine can be.
    return Interval(*(float(np.clip(v, -1, 1)) for v in (found.value, *(found.ends or ()))))


def enough(products: Products) -> int | None:
    """About how many gradients would tell E[g] and E[G] apart from 0; None where these do not say.

    Around 0 the error of ||E[d]||^2 falls as 1 / M: twice the error is below the value at M' = 2 M error / value.
    """
    needed = 0.0
    for matrix in (products.rule, products.reference):
        value, replicates, count = off_diagonal_mean(matrix), left_out(matrix), len(matrix)
        if value <= 0:
            return None
        needed = max(needed, 2 * count * float(np.sqrt((count - 1) * replicates.var())) / value)
    return int(np.ceil(needed))


def variance(products: Floats) -> float:
    """Trace of the covariance of d from <d_i, d_j>."""
    count = len(products)
    return float(np.trace(products) / count - off_diagonal_mean(products))


def signal_to_noise(products: Floats) -> float:
    """||E[g]||^2 / trace of the covariance, 0 where E[g] is not told apart from 0."""
    spread = variance(products)
    return max(0.0, off_diagonal_mean(products)) / spread if spread > 0 else float("inf")
