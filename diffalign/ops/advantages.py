"""From rewards to advantages, in float64. Groups are integer ids; invalid scores carry no weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from diffalign.types import Floats, Scores, rows_by_group

Scale = Literal["group", "batch", "none"]
LEAST_SPREAD = 1e-6  # of what a softmax of rewards divides by
ROUNDINGS = 4  # a group whose range is below so many roundings of its largest reward has no spread


def _check(reward: Floats, group: NDArray[np.int64], valid: NDArray[np.bool_]) -> Floats:
    if not reward.shape == group.shape == valid.shape:
        raise ValueError(f"shapes of reward {reward.shape}, group {group.shape} and valid {valid.shape} differ")
    values = np.asarray(reward, np.float64)
    if not np.isfinite(values[valid]).all():
        raise ValueError("a valid reward is not finite")
    return values


def resolution(reward: Floats) -> float:
    """Relative rounding of rewards (N,): float32's if every one of them is a float32 number, as networks give, else float64's."""
    finite = reward[np.isfinite(reward)]
    single = np.abs(finite) < float(np.finfo(np.float32).max)
    as_single = bool(single.all() and (finite.astype(np.float32).astype(np.float64) == finite).all())
    return float(np.finfo(np.float32 if as_single else np.float64).eps)


def _flat(values: Floats, rounding: float) -> bool:
    """Whether rewards differ by no more than rounding. Dividing by such a spread would give noise full-size advantages; a wider limit
    would make advantages depend on a reward's scale or offset."""
    return bool(np.ptp(values) <= ROUNDINGS * rounding * np.abs(values).max())


def group_relative(
    reward: Floats,
    group: NDArray[np.int64],
    valid: NDArray[np.bool_],
    scale: Scale = "group",
    limit: float = 5.0,
    spread_of: tuple[Floats, NDArray[np.int64], NDArray[np.bool_]] | None = None,
    *,
    baseline: Literal["group", "leave_one_out"] = "group",
    rounding: float | None = None,
) -> Floats:
    """A = (r - b) / std, clipped to +-limit (Flow-GRPO, arXiv 2505.05470, eq. 6, without its eps); all (N,).

    b: the group's mean, or that of the others in it (`leave_one_out`). The standard deviation is the population's, of the group, of all
    rewards (`batch`, as published code has it), or 1 (`none`). Groups without spread and invalid rewards get exactly 0. spread_of: the
    (reward, group, valid) whose standard deviation by group is taken instead, (M,) each; rounding: relative, of the rewards, None:
    `resolution`. So A does not depend on a reward's scale or offset, down to rounding.
    """
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale: got {scale!r}, allowed are group, batch, none")
    values = _check(reward, group, valid)
    rounding = resolution(values[valid]) if rounding is None else rounding
    centred, spread = np.zeros_like(values), np.ones_like(values)
    for rows in rows_by_group(group, valid):
        if _flat(values[rows], rounding):
            continue
        centred[rows] = values[rows] - values[rows].mean()
        if baseline == "leave_one_out":
            # r - (S - r) / (n - 1) = (r - S / n) n / (n - 1)
            centred[rows] *= len(rows) / (len(rows) - 1)
        other = values[rows] if spread_of is None else spread_of[0][(spread_of[1] == group[rows[0]]) & spread_of[2]]
        spread[rows] = other.std()
    if scale == "none":
        return np.clip(centred, -limit, limit)
    if scale == "batch" and centred.any():
        spread[:] = values[valid].std()
    return np.clip(np.divide(centred, spread, out=np.zeros_like(centred), where=spread > 0), -limit, limit)


def softmax_relative(
    reward: Floats,
    group: NDArray[np.int64],
    valid: NDArray[np.bool_],
    limit: float = 5.0,
    *,
    rounding: float | None = None,
) -> Floats:
    """A = exp(r / g) / its group's mean - 1, clipped to +-limit (FlowAWR, arXiv 2606.30376), g the standard deviation of all rewards, at
    least 1e-6; all (N,).

    A group's sum to 0, if no limit is in reach, and are at least -1: only winners are far from 0. Groups without spread and invalid
    rewards get exactly 0.
    """
    values = _check(reward, group, valid)
    rounding = resolution(values[valid]) if rounding is None else rounding
    advantage = np.zeros_like(values)
    if not valid.any():
        return advantage
    width = max(float(values[valid].std()), LEAST_SPREAD)
    for rows in rows_by_group(group, valid):
        if not _flat(values[rows], rounding):
            share = np.exp((values[rows] - values[rows].max()) / width)  # a constant of the group cancels
            advantage[rows] = share / share.mean() - 1
    return np.clip(advantage, -limit, limit)


def softened(advantage: Floats, limit: float = math.inf) -> Floats:
    """limit tanh(A / limit): A where it is small, never beyond +-limit; any shape."""
    return advantage if math.isinf(limit) else limit * np.tanh(advantage / limit)


def standardised(reward: Floats, compared: Floats, limit: float = 5.0) -> Floats:
    """A = (r - mean) / std of the rewards it is compared with (M,), clipped to +-limit (DDPO, sec. 4.3, without its eps); (N,).

    The standard deviation is the population's. Without spread in `compared` every advantage is exactly 0.
    """
    if not len(compared) or _flat(compared, resolution(compared)):
        return np.zeros_like(reward)
    return np.clip((reward - compared.mean()) / compared.std(), -limit, limit)


def decoupled(parts: Sequence[Floats], valid: NDArray[np.bool_], limit: float = 5.0) -> Floats:
    """GDPO's last step (arXiv 2601.05242): the sum of rewards' own weighted advantages (N,), standardised over the whole update.

    Clipped to +-limit. Exactly 0 where invalid, and where no reward tells a sample from its group: every part is 0 there.
    """
    total: Floats = np.sum(parts, 0)
    told = valid & np.any(np.asarray(parts) != 0, axis=0)
    return np.where(told, standardised(total, total[valid], limit), 0.0)


def shares(parts: Mapping[str, Floats], group: NDArray[np.int64], valid: NDArray[np.bool_]) -> dict[str, float]:
    """How much each part (N,) has of the spread within groups of their sum: cov(part, sum) / var(sum), which add up to 1.

    Below 0: it goes against the others. Empty where the sum has no spread.
    """
    _, index = np.unique(group[valid], return_inverse=True)
    counts = np.bincount(index)
    apart = {}
    for name, part in parts.items():
        values = part[valid]
        apart[name] = values - (np.bincount(index, values) / counts)[index]
    total = np.sum(list(apart.values()), 0)
    spread = float((total**2).sum())
    return {name: float((own * total).sum()) / spread for name, own in apart.items()} if spread > 0 else {}


def spread(reward: Floats, group: NDArray[np.int64]) -> float:
    """The mean over groups of the population's standard deviation within each; rewards (N,) that are not finite are left out, and groups
    with fewer than two others. 0 where all are flat, NaN where there is no such group."""
    finite = np.isfinite(reward)
    within = []
    for rows in rows_by_group(group, finite):
        values = reward[rows]
        if len(values) > 1:
            within.append(0.0 if _flat(values, resolution(values)) else float(values.std()))
    return float(np.mean(within)) if within else math.nan


def leave_one_out(reward: Floats, group: NDArray[np.int64], valid: NDArray[np.bool_]) -> Floats:
    """A = r - mean of the *other* members of the group: an unbiased baseline. Groups of one and invalid get 0; (N,)."""
    return group_relative(reward, group, valid, "none", math.inf, baseline="leave_one_out")


def bundled(
    reward: Floats, group: NDArray[np.int64], valid: NDArray[np.bool_], size: int
) -> tuple[Floats, NDArray[np.int64], NDArray[np.bool_]]:
    """Rewards of bundles (RiskPO, arXiv 2510.00911): sample j of `size` groups in a row, added up.

    Returns for every sample its bundle's sum, the id of its `size` groups, and whether the whole bundle is valid; all (N,).

    Raises:
        ValueError: unless groups are of one size and their number is a multiple of `size`.
    """
    values = np.where(valid, reward, 0.0)
    names, counts = np.unique(group, return_counts=True)
    if len(set(counts)) > 1 or len(names) % size:
        raise ValueError(f"bundles of {size} groups from {len(names)} groups of {sorted(set(counts))} samples")
    rows = np.argsort(group, kind="stable").reshape(-1, size, counts[0])  # set, group, sample
    score, whole, name = np.zeros(len(values)), np.zeros(len(values), bool), np.zeros(len(values), np.int64)
    score[rows] = values[rows].sum(1, keepdims=True)
    whole[rows] = valid[rows].all(1, keepdims=True)
    name[rows] = np.arange(len(rows))[:, None, None]
    return score, name, whole


def at_risk(reward: Floats, valid: NDArray[np.bool_], low: float, high: float, weight: float) -> Floats:
    """u(r), the reward whose policy gradient is that of the mixed value-at-risk (RiskPO, arXiv 2510.00911); (N,).

    J = (weight / low int_0^low F^-1 + 1 / (high - low) int_low^high F^-1) / (weight + 1) with the quantile function F^-1 of the
    valid rewards: what lies above the upper quantile does not count, what lies below the lower one counts most. 0 where invalid.
    """
    if not valid.any():
        return np.zeros_like(reward)
    lower, upper = np.quantile(reward[valid], [low, high], method="inverted_cdf")
    # d int_0^a F^-1 = E[-(q_a - r)^+ d log p], and the middle is the difference of two of these
    tail = -np.maximum(lower - reward, 0) / low
    middle = (np.clip(reward, lower, upper) - upper) / (high - low)
    return np.where(valid, (weight * tail + middle) / (weight + 1), 0.0)


def gated(scores: Scores, group: NDArray[np.int64], least: dict[str, float]) -> Scores:
    """The scores with every sample that falls short of a reward's least at its group's worst, in `total` and by name."""
    short = np.zeros(len(scores.total), bool)
    for name, value in least.items():
        short |= scores.valid & (scores.by_name[name] < value)
    if not short.any():
        return scores

    def lowered(values: Floats) -> Floats:
        changed = values.copy()
        for name in np.unique(group[short]):
            changed[short & (group == name)] = values[(group == name) & scores.valid].min()
        return changed

    return replace(scores, total=lowered(scores.total), by_name={k: lowered(v) for k, v in scores.by_name.items()})


def extremes(advantage: Floats, group: NDArray[np.int64], valid: NDArray[np.bool_], count: int) -> Floats:
    """The advantages of each group's `count` best and `count` worst, 0 for the others; all (N,).

    Groups of fewer than twice as many keep all (DanceGRPO's best-of-N selection, arXiv 2505.07818).
    """
    kept = np.zeros_like(advantage)
    for rows in rows_by_group(group, valid):
        order = rows[np.argsort(advantage[rows], kind="stable")]
        chosen = order if len(rows) < 2 * count else np.concatenate([order[:count], order[-count:]])
        kept[chosen] = advantage[chosen]
    return kept


def fuse(
    leaf: Floats,
    valid: NDArray[np.bool_],
    parent: list[NDArray[np.int64]],
    log_prob: list[Floats] | None = None,
    beta: float = 0.0,
) -> tuple[list[Floats], list[NDArray[np.bool_]]]:
    """Rewards of all nodes: r(n) = sum_l w_l r_l over the leaves below, w = softmax(beta log p(l | n)) (BranchGRPO, eq. 4).

    leaf, valid (N_T,); log_prob: of every edge, T arrays (N_{t+1},); beta 0: the plain mean. Returns values and whether there is
    one, T+1 arrays (N_t,) each: a node without a valid leaf has none, and 0.
    """
    values: list[Floats] = [np.where(valid, leaf, 0.0)]
    weights: list[Floats] = [np.where(valid, 0.0, -np.inf)]  # log of the sum over the leaves below of p^beta
    for step in reversed(range(len(parent))):
        index, count = parent[step], int(parent[step].max()) + 1
        edge = weights[0] if beta == 0 or log_prob is None else weights[0] + beta * log_prob[step]
        highest = np.full(count, -np.inf)
        np.maximum.at(highest, index, edge)
        finite = np.where(np.isfinite(highest), highest, 0.0)
        share = np.exp(edge - finite[index])
        total: Floats = np.bincount(index, share, minlength=count).astype(np.float64)
        sums: Floats = np.bincount(index, share * values[0], minlength=count).astype(np.float64)
        values.insert(0, np.divide(sums, total, out=np.zeros(count), where=total > 0))
        weights.insert(0, finite + np.log(total, out=np.full(count, -np.inf), where=total > 0))
    return values, [np.isfinite(weight) for weight in weights]


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
