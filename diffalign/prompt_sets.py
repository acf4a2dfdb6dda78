"""Prompt sets that come with the tool, by name. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Entry = dict[str, Any]


def _shapes(tasks: Sequence[str], split: str) -> list[Entry]:
    from diffalign.shapes import captions

    return [entry for task in tasks or captions.TASKS for entry in captions.captions(task, split)]


def _motion(tasks: Sequence[str], split: str) -> list[Entry]:
    from diffalign.shapes import motion

    return motion.captions(split)


# name -> (tasks, split) -> entries, each with at least `prompt`
SETS: dict[str, Callable[[Sequence[str], str], list[Entry]]] = {"shapes": _shapes, "shapes-motion": _motion}
