"""What a command that compares is given, CONFIG[@KEY=VALUE]... [KEY=VALUE]..., and what each of its parts is called."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from diffalign.config import within
from diffalign.errors import UserError, shown
from diffalign.runtime import keys

KINDS = ("updates", *keys.SPENT)  # of budgets
_CHANGE = re.compile(r"@(?=[A-Za-z_][\w.]*=)")  # a place may have an @ of its own


def apart(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """CONFIG[@KEY=VALUE]... and KEY=VALUE of a command line, each in their order."""
    overrides = [word for word in words if "=" in _CHANGE.split(word)[0]]
    return [word for word in words if word not in overrides], overrides


def changes(word: str) -> tuple[str, list[str]]:
    """CONFIG, and the KEY=VALUE that it is changed by."""
    place, *settings = _CHANGE.split(word)
    return place, settings


def named(words: Sequence[str]) -> list[str]:
    """Every KEY that is given a value."""
    names, overrides = apart(words)
    return [text.partition("=")[0] for text in (*overrides, *(change for name in names for change in changes(name)[1]))]


def labels(names: Sequence[str], settings: Sequence[Mapping[str, Any]], shown: Sequence[set[str]]) -> list[str]:
    """Each one's name, and those of its settings that are to be shown of it.

    names, settings, shown: one entry each of every labelled thing.
    """
    return [
        " ".join([name, *(f"{key}={json.dumps(value)}" for key, value in values.items() if within(key, own))])
        for name, values, own in zip(names, settings, shown, strict=True)
    ]


def twice(labels: Sequence[str]) -> list[str]:
    """Those that are there more than once."""
    return [label for label in dict.fromkeys(labels) if labels.count(label) > 1]


def budget_of(text: str) -> tuple[str, float]:
    """`rows=40000`.

    Raises:
        UserError: if it is no kind of budget, or no positive number of it.
    """
    kind, _, amount = text.partition("=")
    limit = _number(amount)
    whole = kind in ("rows", "seconds") or limit % 1 == 0
    if kind not in KINDS or not 0 < limit < 1e15 or not whole:
        allowed = ", ".join(f"{kind}=N" for kind in KINDS)
        raise UserError(f"--budget: got {shown(text)}, allowed is one of {allowed}, N above 0")
    return kind, limit


def seeds_of(text: str) -> tuple[int, ...]:
    """`0,1,2`.

    Raises:
        UserError: if they are no whole numbers, or one is there twice.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,18}", part) for part in parts) or twice([str(int(part)) for part in parts]):
        raise UserError(f"--seeds: got {shown(text)}, allowed are different whole numbers such as 0,1,2")
    return tuple(map(int, parts))


def target_of(text: str) -> tuple[str, float]:
    """`shapes_geneval=0.5`.

    Raises:
        UserError: if it is no name and number.
    """
    name, _, amount = text.rpartition("=")
    if not name or math.isinf(value := _number(amount)):
        raise UserError(f"--target: got {shown(text)}, allowed is a judge and a score such as shapes_geneval=0.5")
    return name, value


def _number(text: str) -> float:
    """A number; infinity where it is none."""
    try:
        value = float(text)
    except ValueError:
        return math.inf
    return value if math.isfinite(value) else math.inf
