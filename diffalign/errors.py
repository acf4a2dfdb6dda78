"""What goes wrong, told apart: the user's mistakes, faults from outside, samples without a score. Needs nothing to import."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


class UserError(Exception):
    """Mistakes of the user, all of them together: one line each, exit code 2."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def one_line(error: BaseException) -> str:
    """An exception as one line: its type and the first line of its message."""
    message = str(error).strip().splitlines()
    return f"{type(error).__name__}: {message[0]}" if message else type(error).__name__


class Fault(Exception):
    """Something outside the user's input stopped the run; the last good state is kept: exit code 3."""


class Unscored(Fault):
    """Too many samples have no score. Nothing was learnt from them: the parameters are those before the update."""


class Interrupted(Exception):
    """A signal ended the run; its state is saved. `code` is the exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"interrupted, saved; the same command resumes (exit code {code})")
        self.code = code
