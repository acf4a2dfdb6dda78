"""Pieces of LaTeX tables."""

from __future__ import annotations

import re

SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def escaped(text: str) -> str:
    """A text as LaTeX sets it."""
    return re.sub(r"[\\~^&%$#_{}]", lambda found: SPECIAL.get(found[0], "\\" + found[0]), text)


def plus_minus(value: float, ends: tuple[float, float] | None, form: str) -> str:
    """A number with the half-width of its interval, where it has one."""
    text = format(value, form)
    return text if ends is None else rf"{text} $\pm$ {(ends[1] - ends[0]) / 2:.3f}"
