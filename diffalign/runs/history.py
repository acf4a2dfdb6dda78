"""What a run's log says, as curves. Needs no torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from diffalign.evaluation.results import Summary
from diffalign.report.figures import Points
from diffalign.runtime import keys


def curves(
    rows: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, list[tuple[int, float]]], dict[str, Points]]:
    """By key, sorted: training rewards (update, mean over samples), and evaluations (update, mean, low, high); where there is no interval
    its ends are the mean."""
    rewards: dict[str, list[tuple[int, float]]] = defaultdict(list)
    evaluations: dict[str, Points] = defaultdict(list)
    for row in rows:
        for key in keys.rewards(row):
            rewards[key].append((row["update"], row[key]))
        for name, judged in Summary.of_row(row).rewards.items():
            value = judged.value.value
            evaluations[keys.evaluated(name)].append((row["update"], value, *(judged.value.ends or (value, value))))
    return dict(sorted(rewards.items())), dict(sorted(evaluations.items()))
