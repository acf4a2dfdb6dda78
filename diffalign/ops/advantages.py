"""From rewards to advantages, in float64. Groups are integer ids; invalid scores carry no weight."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Scale = Literal["group", "batch", "none"]
FLAT = 1e-6  # a group whose range is below this share of max(1, |mean|) has no spread


def _check(reward: Floats, group: NDArray[np.int64], valid: NDArray[np.bool_]) -> Floats:
    if not reward.shape == group.shape == valid.shape:
        raise ValueError(f"shapes of reward {reward.shape}, group {group.shape} and valid {valid.shape} differ")
    values = np.asarray(reward, np.float64)
    if not np.isfinite(values[valid]).all():
        raise ValueError("a valid reward is not finite")
    return values


def group_relative(
    reward: Floats,
    group: NDArray[np.int64],
    valid: NDArray[np.bool_],
    scale: Scale = "group",
    eps: float = 1e-4,
    limit: float = 5.0,
) -> Floats:
    """A = (r - mean of its group) / (std + eps), clipped to +-limit (Flow-GRPO, arXiv 2505.05470, eq. 6); all (N,).

    The standard deviation is the population's, of the group, or of all centred rewards (`batch`), or 1 (`none`). Groups
    without spread and invalid rewards get exactly 0.
    """
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale: got {scale!r}, allowed are group, batch, none")
    values = _check(reward, group, valid)
    centred, spread = np.zeros_like(values), np.ones_like(values)
    for name in np.unique(group[valid]):
        rows = np.flatnonzero((group == name) & valid)
        mean = values[rows].mean()
        # Rounding gives equal rewards a tiny spread, and dividing by it would give them full-size advantages.
        if np.ptp(values[rows]) > FLAT * max(1.0, abs(mean)):
            centred[rows] = values[rows] - mean
            spread[rows] = values[rows].std()
    if scale == "none":
        return np.clip(centred, -limit, limit)
    if scale == "batch" and centred.any():
        spread[:] = np.sqrt((centred[valid] ** 2).mean())
    return np.clip(centred / (spread + eps), -limit, limit)


def standardised(reward: Floats, compared: Floats, eps: float = 1e-6, limit: float = 5.0) -> Floats:
    """A = (r - mean) / (std + eps) of the rewards it is compared with (M,), clipped to +-limit (DDPO, sec. 4.3); (N,).

    The standard deviation is the population's. Without spread in `compared` every advantage is exactly 0.
    """
    mean = compared.mean() if len(compared) else 0.0
    if not len(compared) or np.ptp(compared) <= FLAT * max(1.0, abs(mean)):
        return np.zeros_like(reward)
    return np.clip((reward - mean) / (compared.std() + eps), -limit, limit)


def leave_one_out(reward: Floats, group: NDArray[np.int64], valid: NDArray[np.bool_]) -> Floats:
    """A = r - mean of the *other* members of the group: an unbiased baseline. Groups of one and invalid get 0; (N,)."""
    values = _check(reward, group, valid)
    advantage = np.zeros_like(values)
    for name in np.unique(group[valid]):
        rows = np.flatnonzero((group == name) & valid)
        if len(rows) > 1:
            # r_i - (S - r_i) / (n - 1)
            advantage[rows] = values[rows] - (values[rows].sum() - values[rows]) / (len(rows) - 1)
    return advantage


def average_to_parents(leaf: Floats, parent: list[NDArray[np.int64]]) -> list[Floats]:
    """Mean of the descendant leaves for every node: leaf (N_T,) to one array (N_t,) per level 0..T."""
    levels: list[Floats] = [np.asarray(leaf, np.float64)]
    weights: list[Floats] = [np.ones(len(leaf))]
    for index in reversed(parent):
        count = int(index.max()) + 1
        weight: Floats = np.bincount(index, weights[0], minlength=count).astype(np.float64)
        total: Floats = np.bincount(index, levels[0] * weights[0], minlength=count).astype(np.float64)
        levels.insert(0, np.divide(total, weight))
        weights.insert(0, weight)
    return levels
