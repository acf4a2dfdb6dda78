"""What goes wrong, told apart: the user's mistakes, faults from outside, samples without a score. Needs nothing to import."""

from __future__ import annotations

LONGEST = 480  # characters of a message
MOST = 20  # messages at a time
EXIT_CODES = {
    0: "done",
    2: "your input: one line a mistake, a config's all at once; nothing was begun",
    3: "a fault from outside stopped it: a reward, a server, a disk, a card; the last checkpoint is kept",
    129: "the terminal closed (SIGHUP); saved, if training had begun",
    130: "Ctrl-C; saved, if training had begun",
    143: "SIGTERM; saved, if training had begun",
    1: "a bug of ours: the traceback is for us",
}


def shortened(text: str, most: int = 120) -> str:
    """A text on one line of at most so many characters; what is too long loses its middle."""
    line = " ".join(
        text[: 4 * most].split() if len(text) <= 4 * most else [*text[: 2 * most].split(), *text[-2 * most :].split()]
    )
    # What a terminal would obey, or no file could hold.
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    half = (most - 3) // 2
    return line if len(line) <= most else f"{line[:half]}...{line[-half:]}"


def shown(value: object) -> str:
    """A value that the user gave, for a message."""
    return shortened(repr(value))


class UserError(Exception):
    """Mistakes of the user, all of them together: one line each, exit code 2."""

    def __init__(self, *problems: str) -> None:
        lines = [
            problem[: len(problem) - len(problem.lstrip())] + shortened(problem, LONGEST) for problem in problems[:MOST]
        ]
        more = len(problems) - MOST
        self.problems = (*lines, *([f"  and {more} more"] if more > 0 else []))
        super().__init__("\n".join(self.problems))


def one_line(error: BaseException) -> str:
    """An exception as one line: its type and the first line of its message."""
    try:
        message = str(error).strip().splitlines()
    except Exception:  # an exception of a user's own that cannot say what it is
        message = []
    return f"{type(error).__name__}: {shortened(message[0], LONGEST // 2)}" if message else type(error).__name__


class Fault(Exception):
    """Something outside the user's input stopped the run; the last good state is kept: exit code 3."""

    def __init__(self, message: str) -> None:
        super().__init__(shortened(message, LONGEST))


class CardFailed(Fault):
    """A card failed under the process: what is on it cannot even be taken apart."""


class Unscored(Fault):
    """Too many samples have no score, or their reward failed: nothing can be learnt from them. The same run may go on later."""


class RewardFailed(Unscored):
    """A reward raised an error, or returned what is no scores."""


class Interrupted(Exception):
    """A signal ended the run; its state is saved. `code` is the exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"interrupted, saved; the same command resumes (exit code {code})")
        self.code = code
