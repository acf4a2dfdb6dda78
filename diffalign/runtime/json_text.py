"""JSON from elsewhere, to plain data: what the standard allows, no deeper and no longer than is sensible."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from diffalign.errors import shortened

DEEPEST = 50  # levels of lists and objects in one another
DIGITS = 40  # of a number
_HALF = re.compile("[\ud800-\udfff]")


def parse(text: str | bytes | bytearray) -> Any:
    """None, bool, int, float, str, lists, and dicts of them.

    Raises:
        ValueError: one line that says why: no JSON, not UTF-8, NaN or infinity, a key twice, half a character, too deep.
    """
    try:
        whole = text.decode("utf-8-sig") if not isinstance(text, str) else text
        value = json.loads(
            whole, parse_constant=_no_number, parse_int=_whole, parse_float=_real, object_pairs_hook=_once
        )
    except RecursionError:
        raise ValueError(f"more than {DEEPEST} levels") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at character {error.pos + 1})") from None
    _check(value, 0)
    return value


def _check(value: Any, level: int) -> None:
    if level > DEEPEST:
        raise ValueError(f"more than {DEEPEST} levels")
    if isinstance(value, str) and _HALF.search(value):
        raise ValueError(f"half a character in {shortened(value, 60)}")
    if isinstance(value, (list, dict)):
        inside = value if isinstance(value, list) else [*value, *value.values()]
        for part in inside:
            _check(part, level + 1)


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON's")


def _whole(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _real(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{shortened(digits, 40)} is too large a number")
    return number


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {shortened(twice, 60)} is given twice")
    return found
