"""Files that are made from others: written, or told which are not as they would be made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]


def keep(made: Mapping[Path, str], write: bool) -> int:
    """Write files, by their paths in the repository, or say which differ; the exit code is how many do."""
    differ = 0
    for path, content in made.items():
        place = ROOT / path
        if place.is_file() and place.read_text(encoding="utf-8") == content:
            continue
        differ += 1
        print(f"{path} {'written' if write else 'differs'}")
        if write:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(content, encoding="utf-8")
    return 0 if write else differ
