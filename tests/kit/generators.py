"""Many inputs from one seed: a hundred in the ordinary run, two thousand with `-m slow`."""

import time
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffalign.errors import Fault, UserError

COUNTS = pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**60), 10**60)
    | st.floats()
    | st.text(max_size=40)
    | st.sampled_from(["", "~", "yes", "../x", "/", "x" * 5000, "\x00", "\ud800", "1e400", "日本", "$x$", "-1"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)  # what JSON and YAML can hold


def tried(strategy: st.SearchStrategy, count: int, check: Callable) -> None:
    """Check many draws of a strategy, the same ones every time."""

    @given(strategy)
    def found(drawn: object) -> None:
        check(drawn)

    every = list(HealthCheck)
    settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=every)(found)()


def promised(work: Callable[[], object], seconds: float = 10.0) -> object:
    """Do some work: it is whole, or refused in lines of under 500 characters, and quick; None where it was refused."""
    started, result, said = time.monotonic(), None, ("nothing",)
    try:
        result = work()
    except UserError as error:
        said = error.problems
    except Fault as error:
        said = (str(error),)
    assert said
    for line in said:
        assert 0 < len(line) < 500
        assert line.isprintable(), line
    assert time.monotonic() - started < seconds
    return result


BAD = [
    *("!!python/object:os.x", "&a", "*a", "[" * 3000, "{", "\t", "9" * 5000, "\x00", "- ", ": ", "'", "%", "|", ">"),
    *("\ud800", "\u2028", "\x0c", "\x85", "\ufeff", "\r", '"', "\\ud800", ",", "{" * 3000),
]


@st.composite
def broken(draw: st.DrawFn, text: str) -> str:
    """A text with something done to it: characters put in, taken out, doubled, lines repeated or cut."""
    for _ in range(draw(st.integers(1, 3))):
        lines = text.split("\n")
        at, k = draw(st.integers(0, len(text))), draw(st.integers(0, len(lines) - 1))
        piece = draw(st.text(max_size=6) | st.sampled_from(BAD))
        text = draw(
            st.sampled_from(
                [
                    text[:at] + piece + text[at:],
                    text[:at] + text[at + 1 :],
                    text[:at],
                    "\n".join([*lines[:k], lines[k], *lines[k:]]),
                    "\n".join([*lines[:k], *lines[k + 1 :]]),
                    "\n".join([*lines[:k], lines[k] + piece, *lines[k + 1 :]]),
                ]
            )
        )
    return text
