"""What a row's matching error weighs where a group's implicit rewards are fitted to its advantages, in float64.

R = log p - log p_ref, here -(l - l_ref) with l a row's matching error on the same noise, is a group's implicit reward up to a constant of
the group. All take advantages and R (N,), group ids, and which rows have a score, and return u (N,), 0 where there is none: the gradient of
mean_i u_i l_i, u held constant, is that of the loss named. At R = 0 each is the advantage-weighted loss's, up to a factor.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from diffalign.types import Floats, rows_by_group

Weights = Callable[[Floats, Floats], Floats]


def group_gate(
    advantage: Floats, reward: Floats, group: NDArray[np.int64], valid: NDArray[np.bool_], beta: float
) -> Floats:
    """u_i = w_g A_i, w_g = sigmoid(-(beta / G) sum_{j in g} A_j R_j): that of -(1 / beta) log sigmoid((beta / G) sum_j A_j R_j).

    Averaged over groups (DGPO, arXiv 2510.08425): the gate w closes once a group is in the order of its advantages. With two samples
    and A = +-1 it is Diffusion-DPO's with half of beta.
    """

    def of(a: Floats, r: Floats) -> Floats:
        return _sigmoid(-beta * float(np.mean(a * r))) * a

    return _by_group(advantage, reward, group, valid, of)


def residual(
    advantage: Floats, reward: Floats, group: NDArray[np.int64], valid: NDArray[np.bool_], beta: float
) -> Floats:
    """u_i = A_i - beta (R_i - mean_g R): that of mean_i (beta (R_i - mean_g R) - A_i)^2 / (2 beta) (CRD, arXiv 2603.14128)."""

    def of(a: Floats, r: Floats) -> Floats:
        return a - beta * (r - r.mean())

    return _by_group(advantage, reward, group, valid, of)


def listwise(
    advantage: Floats, reward: Floats, group: NDArray[np.int64], valid: NDArray[np.bool_], beta: float
) -> Floats:
    """u_i = G (q_i - p_i), q = softmax(A), p = softmax(beta R) over the group: that of -(1 / beta) sum_i q_i log p_i.

    Averaged over groups (listwise GDRO, arXiv 2601.02036).
    """

    def of(a: Floats, r: Floats) -> Floats:
        return len(a) * (_softmax(a) - _softmax(beta * r))

    return _by_group(advantage, reward, group, valid, of)


def _by_group(
    advantage: Floats, reward: Floats, group: NDArray[np.int64], valid: NDArray[np.bool_], of: Weights
) -> Floats:
    """`of` every group's valid rows, whose advantages are centred: their sum cancels the group's own constant in R."""
    if not advantage.shape == reward.shape == group.shape == valid.shape:
        shapes = f"{advantage.shape}, {reward.shape}, {group.shape}, {valid.shape}"
        raise ValueError(f"shapes of advantage, reward, group and valid differ: {shapes}")
    weights = np.zeros(len(advantage))
    for rows in rows_by_group(group, valid):
        own = advantage[rows] - advantage[rows].mean()
        weights[rows] = of(own, reward[rows])
    return weights


def _softmax(values: Floats) -> Floats:
    shifted = np.exp(values - values.max())
    return shifted / shifted.sum()


def _sigmoid(value: float) -> float:
    """1 / (1 + e^-x) without overflow."""
    return float(0.5 * (1 + np.tanh(value / 2)))
