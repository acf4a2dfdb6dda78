"""How far something is: told by what does it, shown by `display` or by nobody."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # (what is being done, how much of it is, of how much; 0 of 0: not known)


def silent(what: str, done: int, of: int) -> None:
    """A progress that nobody watches."""
