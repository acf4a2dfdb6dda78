"""Folders whose every byte is accounted for: `SHA256SUMS` beside the files, as `sha256sum -c` reads it."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from diffalign.runtime.files import write_text

SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  ([\w.-]+)", re.ASCII)


def digest(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            hashed.update(piece)
    return hashed.hexdigest()


def sign(folder: Path) -> None:
    """Write down what the folder's files hold."""
    names = sorted(path.name for path in folder.iterdir() if path.name != SUMS)
    write_text(folder / SUMS, "".join(f"{digest(folder / name)}  {name}\n" for name in names))


def intact(folder: Path) -> bool:
    """Whether the files are there and hold what was signed; what was put beside them later does not count."""
    try:
        lines = (folder / SUMS).read_bytes().decode("ascii").split("\n")
        matches = [_LINE.fullmatch(line) for line in lines[:-1]]
        if not matches or lines[-1] or None in matches:
            return False
        return all(match is not None and digest(folder / match[2]) == match[1] for match in matches)
    except (OSError, ValueError):
        return False
