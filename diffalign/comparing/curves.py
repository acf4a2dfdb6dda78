"""Curves of methods over their seeds: mean, lowest and highest, wherever every seed was evaluated."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diffalign.comparing.results import MethodResult


@dataclass(frozen=True)
class Curve:
    """updates, x (E,): how many, and what had been spent on average; y, low, high (E,): mean, lowest and highest over seeds."""

    label: str
    seeds: int
    updates: list[int]
    x: list[float]
    y: list[float]
    low: list[float]
    high: list[float]


def curve(method: MethodResult, judge: str, kind: str) -> Curve:
    """A judge's view of a method along what it spent of a kind; empty where that is not known."""
    every = [
        dict(zip(each.known(kind), zip(*each.curve(judge, kind), strict=True), strict=True)) for each in method.found
    ]
    shared = sorted(set(every[0]).intersection(*every[1:])) if every else []
    points = np.array([[each[update] for update in shared] for each in every]).reshape(len(every), len(shared), 2)
    if not shared:
        return Curve(method.label, len(every), [], [], [], [], [])
    spent, score = points[..., 0], points[..., 1]
    return Curve(
        method.label,
        len(every),
        shared,
        spent.mean(0).tolist(),
        score.mean(0).tolist(),
        score.min(0).tolist(),
        score.max(0).tolist(),
    )
