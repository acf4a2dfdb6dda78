"""The one place where figures get their text: as it is, without markup, in fonts that have its letters."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from diffalign.runtime.files import whole

FIRST = "DejaVu Sans"  # matplotlib brings it


@contextmanager
def figures(texts: Iterable[str] = ()) -> Iterator[Any]:
    """matplotlib's pyplot for files; a `$` in a text is a dollar, and `texts` are drawn in installed fonts that have their letters."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    letters = frozenset(letter for text in texts for letter in text if ord(letter) > 127)
    settings: Any = {"text.parse_math": False, "font.family": list(families(letters))}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # Letters that no installed font has are drawn as boxes: `lacking` says so once.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        warnings.filterwarnings("ignore", "Matplotlib currently does not support")
        yield plt
        plt.close("all")


def save(figure: Any, path: Path, dots: int) -> None:
    """Write a figure whole, with so many pixels an inch, in the format of its ending."""
    with whole(path) as file:
        figure.savefig(file, dpi=dots, format=path.suffix[1:] or "png")


def lacking(texts: Iterable[str]) -> str:
    """What to say of letters that no installed font has; empty if there are none."""
    letters = frozenset(letter for text in texts for letter in text if ord(letter) > 127)
    missing = letters - set().union(*(_letters(path) for name, path in _fonts() if name in families(letters)))
    some = "".join(sorted(missing)[:8])
    return (
        f"no installed font has {len(missing)} letters of the prompts ({some}): pictures show boxes for them"
        if missing
        else ""
    )


@cache
def families(letters: frozenset[str]) -> tuple[str, ...]:
    """Names of fonts that together have these letters, as far as installed ones do; the first has all of Latin."""
    chosen, left = [FIRST], set(letters)
    for name, path in _fonts():
        found = left & _letters(path) if left else set()
        if found:
            left -= found
            chosen += [name] if name not in chosen else []
    return tuple(chosen)


@cache
def _fonts() -> list[tuple[str, str]]:
    from matplotlib import font_manager

    plain = [
        font
        for font in font_manager.fontManager.ttflist
        if not font.name.startswith("Last Resort")
        and font.style == "normal"
        and font.weight in (400, "normal", "regular")
    ]
    ordered = sorted(plain, key=lambda font: (font.name != FIRST, font.name))
    return list({font.name: (font.name, font.fname) for font in reversed(ordered)}.values())[::-1]


@cache
def _letters(path: str) -> frozenset[str]:
    from matplotlib import ft2font

    if not Path(path).is_file():
        return frozenset()
    return frozenset(map(chr, ft2font.FT2Font(path).get_charmap()))


def plain_ticks(axis: Any) -> None:
    """Powers of ten on a logarithmic axis without markup."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
