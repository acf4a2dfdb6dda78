"""From several rewards to one advantage: what rules share that learn from scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from diffalign import ops
from diffalign.errors import UserError
from diffalign.rules._rule import RewardSettings, RuleSettings, check_known
from diffalign.types import Floats, Integers, Scores


class MergeSettings(RewardSettings):
    """Keys of rules that learn from scores."""

    combine: Literal["sum", "normalised", "gdpo"] = Field(
        "sum",
        description="several rewards: summed; normalised: each by itself first; gdpo: and the sum over the update",
    )
    gate: dict[str, float] = Field({}, description="reward: least; samples below it count as the worst of their group")
    advantage_limit: float = Field(5.0, gt=0, description="advantages are clipped to +- this")
    diversity: str | None = Field(
        None, description="a reward of weight 0 that multiplies gains, such as novelty (GARDO); null: none"
    )
    soft_limit: float | None = Field(
        None, gt=0, description="clipped advantages A become this x tanh(A / this); null: stay"
    )

    def problems(self, steps: int) -> list[str]:
        """What is wrong with these settings for a sampler of `steps` steps."""
        problems = super().problems(steps)
        if self.combine != "sum":
            problems += self.idle(("unit",), "rule.combine: sum, which alone depends on rewards' units")
        if self.combine == "gdpo" and (scale := getattr(self, "scale", "group")) != "group":
            problems.append(f"rule.scale: got {scale}, gdpo normalises each reward within its prompt; allowed is group")
        return problems


def columns(scores: Scores, group: Integers, settings: MergeSettings) -> dict[str, Floats]:
    """What is turned into advantages, by name: the gated rewards (N,) of samples whose prompts are `group`, or "total", their weighted sum.

    Raises:
        UserError: if `gate` names a reward that the run does not have.
    """
    check_known("rule.gate", settings.gate, scores.by_name)
    scores = ops.advantages.gated(scores, group, settings.gate)
    if settings.combine == "sum":
        return {"total": scores.total}
    return {name: scores.by_name[name] for name in scores.weights}


def merged(
    scores: Scores,
    group: Integers,
    settings: MergeSettings,
    of: Callable[[str, Floats, float], list[Floats]],
    valid: Sequence[NDArray[np.bool_]] | None = None,
) -> list[Floats]:
    """Advantages of scores whose samples' prompts are `group` (N,): of the weighted sum, or the weighted sum of those of every reward.

    With `diversity` what is gained counts times that reward: a copy of another sample teaches nothing (GARDO, arXiv 2512.24138).

    of: a column's name, values (N,), anything where invalid, and relative rounding, to advantages, any number of arrays; valid: whether
    what each of these is of has a score, None: one array, of the samples.
    """
    # A sum is as coarse as its coarsest part, whatever its own numbers look like.
    coarse = {name: ops.advantages.resolution(scores.by_name[name][scores.valid]) for name in scores.weights}
    counted = [coarse[name] for name, weight in scores.weights.items() if weight]
    total = max([*counted, ops.advantages.resolution(scores.total[scores.valid])])
    advantages = {
        name: of(name, values, coarse.get(name, total)) for name, values in columns(scores, group, settings).items()
    }
    soft = math.inf if settings.soft_limit is None else settings.soft_limit
    found = [ops.advantages.softened(each, soft) for each in _combined(advantages, scores, settings, valid)]
    return found if settings.diversity is None else _diverse(found, scores, settings.diversity)


def _diverse(advantages: list[Floats], scores: Scores, name: str) -> list[Floats]:
    """Advantages whose gains count times a reward; without a score nothing is gained.

    Raises:
        UserError: if the run does not have it, or it gave less than 0.
    """
    check_known("rule.diversity", [name], scores.by_name)
    factor = np.where(scores.valid, scores.by_name[name], 0.0)
    if factor.min() < 0:
        raise UserError(
            f"rule.diversity: got {name}, which gave {factor.min():.4g} and would turn gains round; allowed are those of 0 and more"
        )
    return [np.where(advantage > 0, advantage * factor, advantage) for advantage in advantages]


def _combined(
    advantages: dict[str, list[Floats]],
    scores: Scores,
    settings: MergeSettings,
    valid: Sequence[NDArray[np.bool_]] | None,
) -> list[Floats]:
    """Columns' advantages as one, see `merged`."""
    if settings.combine == "sum":
        return advantages["total"]
    # sum_k w_k A(r_k), clipped as A is
    parts = [[weight * part for part in advantages[name]] for name, weight in scores.weights.items()]
    limit, levels = settings.advantage_limit, list(zip(*parts, strict=True))
    if settings.combine == "normalised":
        return [np.clip(np.sum(level, 0), -limit, limit) for level in levels]
    known = [scores.valid] if valid is None else valid
    return [ops.advantages.decoupled(level, own, limit) for level, own in zip(levels, known, strict=True)]


def shares(scores: Scores, group: Integers, settings: RuleSettings) -> dict[str, float]:
    """What share each of several rewards has of the advantages' spread within prompts, see `ops.advantages.shares`; empty of one alone."""
    if len(scores.weights) < 2:
        return {}
    values = scores.by_name
    if isinstance(settings, MergeSettings) and settings.combine != "sum":
        values = {
            name: ops.advantages.group_relative(own, group, scores.valid, limit=settings.advantage_limit)
            for name, own in columns(scores, group, settings).items()
        }
    parts = {name: weight * values[name] for name, weight in scores.weights.items()}
    return ops.advantages.shares(parts, group, scores.valid)


def units(scores: Scores, group: Integers, floored: Collection[str] = ()) -> dict[str, float]:
    """What every reward is divided by to have a mean standard deviation of 1 within groups; 1 where it has neither weight nor floor.

    Raises:
        UserError: if one has no spread.
    """
    found = {name: ops.advantages.spread(values, group) for name, values in scores.by_name.items()}
    counted = {name for name, weight in scores.weights.items() if weight or name in floored}
    if flat := [name for name, unit in found.items() if name in counted and not unit > 0]:
        raise UserError(
            f"rule.unit: got auto, {', '.join(flat)} has no spread within the first update's prompts; allowed is null"
        )
    return {name: unit if name in counted else 1.0 for name, unit in found.items()}
