"""Names in a run's folder that carry how many updates were done: `update_000130`, with an ending or none.

One strict pattern: what does not match it exactly is somebody else's and is neither read nor deleted.
"""

from __future__ import annotations

import re
from pathlib import Path

_NAME = re.compile(r"update_(\d{6,8})(\.[a-z.]+)?")


def name(update: int, ending: str = "") -> str:
    """The name after `update` updates."""
    return f"update_{update:06d}{ending}"


def number(text: str, ending: str = "") -> int | None:
    """How many updates a name says, None where it is not exactly what `name` gives."""
    match = _NAME.fullmatch(text)
    if match is None or not match[1].isascii() or text != name(int(match[1]), ending):
        return None
    return int(match[1])


def files(folder: Path, ending: str) -> dict[int, Path]:
    """Update -> file of that name in a folder, in rising order."""
    return {update: path for update, path in _entries(folder, ending) if path.is_file()}


def folders(folder: Path) -> dict[int, Path]:
    """Update -> folder of that name in a folder, in rising order."""
    return {update: path for update, path in _entries(folder, "") if path.is_dir()}


def _entries(folder: Path, ending: str) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    found = ((number(path.name, ending), path) for path in folder.iterdir())
    return sorted((update, path) for update, path in found if update is not None)
