"""Prompt sets by name, and published ones from the user's copy: `NAME@PLACE`. Needs no torch."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffalign.errors import UserError
from diffalign.prompts.sets import animals, geneval_like, published

Entry = dict[str, Any]


def _shapes(tasks: Sequence[str], split: str) -> list[Entry]:
    from diffalign.shapes import captions

    return [entry for task in tasks or captions.TASKS for entry in captions.captions(task, split)]


def _motion(tasks: Sequence[str], split: str) -> list[Entry]:
    from diffalign.shapes import motion

    return motion.captions(split)


# name -> (tasks, split) -> entries, each with at least `prompt`
SETS: dict[str, Callable[[Sequence[str], str], list[Entry]]] = {
    "shapes": _shapes,
    "shapes-motion": _motion,
    "geneval-like": geneval_like.prompts,
    "animals": animals.prompts,
}


def _reason(error: Exception) -> str:
    message = " ".join(str(error).split())[:300]
    return f"it has no {message}" if isinstance(error, KeyError) else message


def has_splits(source: str) -> bool:
    """Whether training, validation and test prompts of a source are apart already."""
    named = published.PUBLISHED.get(source.partition("@")[0])
    return source in SETS or (named is not None and named.splits)


def find(source: str, tasks: Sequence[str], split: str, field: str) -> list[Entry] | None:
    """The entries of a set by name, or of a published one by NAME@PLACE; None for what is neither.

    Raises:
        UserError: if a place does not hold what it should.
    """
    if source in SETS:
        return SETS[source](tasks, split)
    name, at, place = source.partition("@")
    if not at or name not in published.PUBLISHED:
        return None
    known = published.PUBLISHED[name]
    if not place:
        raise UserError(f"{field}: got {source!r}, expected {known.layout} after the @")
    try:
        return known.read(Path(place), *([split] if known.splits else []))
    except (OSError, ValueError, KeyError, TypeError, ImportError, csv.Error) as error:
        raise UserError(f"{field}: got {source!r}, expected {known.layout} ({_reason(error)})") from error
