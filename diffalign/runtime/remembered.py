"""What was found out about this machine once and is not worth finding out again: a JSON file in the user's cache folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffalign.runtime.files import write_text
from diffalign.runtime.launcher import cache_folder


def place() -> Path:
    """`$XDG_CACHE_HOME/diffalign/machine.json`, or that under `~/.cache`."""
    return cache_folder() / "diffalign" / "machine.json"


def recall(name: str) -> Any | None:
    """What was remembered under a name; None: nothing. A file that cannot be read holds nothing: it is found out again."""
    return _all().get(name)


def remember(name: str, value: Any, say: Callable[[str], None]) -> None:
    """Keep a JSON-serialisable value; where that cannot be, say so: it is found out again next time."""
    try:
        place().parent.mkdir(parents=True, exist_ok=True)
        write_text(place(), json.dumps({**_all(), name: value}, indent=1, sort_keys=True))
    except OSError as error:
        say(f"cannot keep what was found out about this machine ({place()}: {error.strerror or error})")


def _all() -> dict[str, Any]:
    try:
        held = json.loads(place().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return held if isinstance(held, dict) else {}
