"""`python -m tests.families [--write]`: the table of what works for which family, tried out now; --write puts it into docs/."""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path

import torch

from tests.families import FAMILIES
from tests.families.probe import probe

TABLE = Path(__file__).parent.parent.parent / "docs" / "capabilities.json"
README = TABLE.parent.parent / "README.md"
START, END = "<!-- capabilities -->\n", "<!-- end of capabilities -->"


def committed() -> dict[str, dict[str, str]]:
    """The table in docs/."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


def markdown(rows: dict[str, dict[str, str]]) -> str:
    """The table for the README."""
    columns = list(next(iter(rows.values())))
    lines = ["| family | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join([*lines, *(f"| {name} | " + " | ".join(row.values()) + " |" for name, row in rows.items())]) + "\n"


def main() -> None:
    """Try every family, print, and write if asked to."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    started = time.perf_counter()
    rows = {name: probe(name) for name in FAMILIES}
    print(markdown(rows), f"{time.perf_counter() - started:.0f} s", sep="\n")
    if "--write" in sys.argv:
        TABLE.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        text = README.read_text(encoding="utf-8")
        before, rest = text.split(START)
        README.write_text(before + START + markdown(rows) + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
