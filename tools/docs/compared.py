"""What `diffalign compare` found of the rules, from the results that are kept, for docs/choosing-a-rule.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffalign.evaluation.intervals import Interval
from tools.docs.markdown import table

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def _found(model: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"compare_{model}.json").read_text(encoding="utf-8"))


def methods(model: str) -> list[str]:
    """A row a rule: what it reached, and what a score cost it."""
    found = _found(model)
    judges, target = found["judges"], found["target"]

    def row(method: dict[str, Any]) -> tuple[str, ...]:
        gains = [Interval.of(method["judges"][judge]["gain"]).text("+.3f") for judge in judges]
        cost = target["costs"][method["label"]]["rows"]
        reached = f"{cost['median']:,.0f}" if cost["median"] is not None else "-"
        spread = f"{reached} ({cost['reached']} of {cost['units']})"
        return f"`{method['label']}`", *gains, f"{method['updates']:.0f}", spread

    head = (
        "rule",
        *(f"`{judge}`" for judge in judges),
        "updates",
        f"rows to {target['score']:.3f} on `{target['judge']}`",
    )
    return table(head, map(row, found["methods"]))


def resolved(model: str) -> list[str]:
    """The pairs that are told apart, a line each."""
    pairs = [pair for pair in _found(model)["pairs"] if pair["resolved"]]
    return [f"- {pair['sentence']}" for pair in pairs] or ["- none"]
