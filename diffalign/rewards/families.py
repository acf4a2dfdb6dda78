"""Which judges a training has in its domain: what was trained on, and what learned from the same data or is the same model.

A gain by such a judge may be that judge's alone; what is held out must be of another family.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from diffalign.rewards import catalog

TRAINED_ON, IN_DOMAIN = "trained on", "in domain"


def family(name: str) -> str:
    """Of a reward by name, with its weights' place or without; empty where it shares nothing that is known, as a function of one's own."""
    entry = catalog.builtin().get(catalog.shipped(name))
    return "" if entry is None else entry.family


def mark(judge: str, trained: Iterable[str]) -> str:
    """`trained on`, `in domain` for one of the family of what was trained on, or empty."""
    names = list(trained)
    if catalog.shipped(judge) in map(catalog.shipped, names):
        return TRAINED_ON
    own = family(judge)
    return IN_DOMAIN if own and own in map(family, names) else ""


def warning(judges: Sequence[str], trained: Iterable[str], ways_out: str) -> str:
    """What to say where every judge is in the domain of what was trained on; empty where one is not, or there is none of either."""
    names = list(trained)
    if not judges or not names or not all(mark(judge, names) for judge in judges):
        return ""
    said = ", ".join(f"{judge} ({mark(judge, names)})" for judge in judges)
    return f"every judge is of a family that was trained on: {said}; a gain may be theirs alone: {ways_out}"
