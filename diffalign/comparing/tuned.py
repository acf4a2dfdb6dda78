"""What is known of how a method came by its settings: what `diffalign tune` tried, written beside the config that it chose.

`tuned.json` beside `best.yaml`: trials, how many failed, budget of each, captions and judge, ranges, and the best trial's settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffalign import config as configs
from diffalign.comparing.methods import Method
from diffalign.config import Config
from diffalign.errors import UserError, one_line
from diffalign.runtime import json_text

BEST, FACTS = "best.yaml", "tuned.json"
SAME = ("trials", "budget", "captions", "judge")  # facts that are the same where methods were tuned alike


def read(path: Path, config: Config) -> dict[str, Any] | None:
    """The facts beside a config's file; None where `tune` did not write that. `changed`: keys that it chose and that are others here.

    Raises:
        UserError: if they are damaged.
    """
    place = path.with_name(FACTS)
    if path.name != BEST or not place.is_file():
        return None
    try:
        facts = json_text.parse(place.read_bytes())
        chosen = facts["best"]["settings"]
        assert all(key in facts for key in (*SAME, "failed", "ranges"))
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"{place}: damaged ({one_line(error)}); allowed is what tune wrote, or none") from error
    own = configs.settings(config)
    return {**facts, "changed": [key for key, value in chosen.items() if configs.at(own, key) != value]}


def alike(methods: Sequence[Method]) -> bool:
    """Whether all were tuned, and alike: as many trials of the same budget, by the same judge on the same captions, and what they have in
    common over the same range."""
    known = [method.tuned for method in methods if method.tuned is not None and not method.tuned["changed"]]
    if len(known) < len(methods) or not known:
        return False
    ranges: dict[str, list[Any]] = {}
    for facts in known:
        for each in facts["ranges"]:
            ranges.setdefault(each["key"], []).append(each.get("factors") or [each["low"], each["high"]])
    same = all(facts[key] == known[0][key] for facts in known for key in SAME)
    return same and all(each == own[0] for own in ranges.values() for each in own)


def said(methods: Sequence[Method]) -> list[str]:
    """What is to be said of it, a line each; nothing where nothing was tuned."""
    if not any(method.tuned for method in methods):
        return []
    if alike(methods):
        first = methods[0].tuned
        assert first is not None
        one = "Settings were tuned beforehand"
        return [f"{one}{', for all methods alike' if len(methods) > 1 else ''}: {_effort(first)}."]
    return [
        "Settings were not tuned alike, so that a difference may be the tuning's:",
        *(f"{method.label}: {_own(method.tuned)}" for method in methods),
    ]


def _own(facts: dict[str, Any] | None) -> str:
    if facts is None:
        return "not tuned"
    if facts["changed"]:
        return f"{', '.join(facts['changed'])} changed after tuning ({_effort(facts)})"
    return f"{_effort(facts)}; {', '.join(map(range_said, facts['ranges']))}"


def _effort(facts: dict[str, Any]) -> str:
    trials = facts["trials"]
    return (
        f"{trials} trial{'s' * (trials != 1)} of {budget_said(facts['budget'])} each, chosen by the gain of {facts['judge']} "
        f"on {facts['captions']} captions"
    )


def budget_said(budget: dict[str, float]) -> str:
    """`rows=4000`."""
    ((kind, limit),) = budget.items()
    return f"{kind}={limit:.10g}"


def range_said(each: dict[str, Any]) -> str:
    """`optimizer.lr from 0.0001 to 0.01`."""
    return f"{each['key']} from {each['low']:.4g} to {each['high']:.4g}"


def table(methods: Sequence[Method]) -> list[tuple[str, str, str, str, str]]:
    """Method, trials and how many of them failed, key, range and what was chosen, a row a key."""
    rows = []
    for method in methods:
        if (facts := method.tuned) is None:
            rows.append((method.label, "not tuned", "", "", ""))
            continue
        failed = f", {facts['failed']} failed" if facts["failed"] else ""
        for each in facts["ranges"]:
            own = facts["best"]["settings"][each["key"]]
            span = f"{each['low']:.4g} to {each['high']:.4g}"
            rows.append((method.label, f"{facts['trials']}{failed}", each["key"], span, f"{own:.4g}"))
    return rows
