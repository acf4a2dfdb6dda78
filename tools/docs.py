"""`python -m tools.docs [--write]`: everything in the repository that is made from the code. Tests hold it equal.

Without --write it says which files differ. A page by hand has generated parts between `<!-- made: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from diffalign.config import json_schema

ROOT = Path(__file__).parents[1]


def made() -> dict[Path, str]:
    """Every file's path in the repository and its text."""
    return {Path("configs") / json_schema.FILE: json_schema.text()}


def main(write: bool) -> int:
    """Write the files, or say which differ; the exit code is how many do."""
    differ = 0
    for path, content in made().items():
        place = ROOT / path
        if place.is_file() and place.read_text(encoding="utf-8") == content:
            continue
        differ += 1
        print(f"{path} {'written' if write else 'differs'}")
        if write:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(content, encoding="utf-8")
    return 0 if write else differ


if __name__ == "__main__":
    sys.exit(main("--write" in sys.argv))
