"""From several rewards to one advantage: what rules share that learn from scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from pydantic import Field

from diffalign import ops
from diffalign.errors import UserError
from diffalign.rules._rule import RuleSettings
from diffalign.types import Floats, Integers, Scores


class MergeSettings(RuleSettings):
    """Keys of rules that learn from scores."""

    combine: Literal["sum", "normalised"] = Field(
        "sum", description="several rewards: sum: weighted, then normalised; normalised: each by itself, then weighted"
    )
    gate: dict[str, float] = Field({}, description="reward: least; samples below it count as the worst of their group")
    advantage_limit: float = Field(5.0, gt=0, description="advantages are clipped to +- this")


def columns(scores: Scores, group: Integers, settings: MergeSettings) -> dict[str, Floats]:
    """What is turned into advantages, by name: the gated rewards (N,) of samples whose prompts are `group`, or "total", their weighted sum.

    Raises:
        UserError: if `gate` names a reward that the run does not have.
    """
    if unknown := [name for name in settings.gate if name not in scores.by_name]:
        raise UserError(f"rule.gate: got {unknown[0]!r}, allowed are this run's rewards: {', '.join(scores.by_name)}")
    scores = ops.advantages.gated(scores, group, settings.gate)
    if settings.combine == "sum":
        return {"total": scores.total}
    return {name: scores.by_name[name] for name in scores.weights}


def merged(
    scores: Scores, group: Integers, settings: MergeSettings, of: Callable[[str, Floats, float], list[Floats]]
) -> list[Floats]:
    """Advantages of scores whose samples' prompts are `group` (N,): of the weighted sum, or the weighted sum of those of every reward.

    of: a column's name, values (N,), anything where invalid, and relative rounding, to advantages, any number of arrays.
    """
    # A sum is as coarse as its coarsest part, whatever its own numbers look like.
    coarse = {name: ops.advantages.resolution(scores.by_name[name][scores.valid]) for name in scores.weights}
    counted = [coarse[name] for name, weight in scores.weights.items() if weight]
    total = max([*counted, ops.advantages.resolution(scores.total[scores.valid])])
    advantages = {
        name: of(name, values, coarse.get(name, total)) for name, values in columns(scores, group, settings).items()
    }
    if settings.combine == "sum":
        return advantages["total"]
    # sum_k w_k A(r_k), clipped as A is
    parts = [[weight * part for part in advantages[name]] for name, weight in scores.weights.items()]
    limit = settings.advantage_limit
    return [np.clip(np.sum(level, 0), -limit, limit) for level in zip(*parts, strict=True)]
