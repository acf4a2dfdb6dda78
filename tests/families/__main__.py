"""`python -m tests.families [--write]`: the table of what works for which family, tried out now; --write puts it into docs/."""

from __future__ import annotations

import json
import sys
import time
import warnings

import torch

from diffalign import config
from tests.families import FAMILIES
from tests.families.probe import probe
from tests.kit import ROOT

TABLE = ROOT / "docs" / "capabilities.json"
LISTED = TABLE.parent / "pipelines.md"
PAGE = TABLE.parent / "bases.md"
BASES = """# Models on the hub that configs name

Licences and gating are of November 2026 and mostly from memory: a model's card decides. Published settings are from where they
say. None of these configs has been run with the model's weights. `python -m tests.families --write` makes this page from their
headers.

| model | licence | published settings | configs |
|---|---|---|---|
"""
START, END = "<!-- capabilities -->\n", "<!-- end of capabilities -->"


def committed() -> dict[str, dict[str, str]]:
    """The table in docs/."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


def markdown(rows: dict[str, dict[str, str]]) -> str:
    """The table of docs/pipelines.md."""
    columns = list(next(iter(rows.values())))
    lines = ["| family | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join([*lines, *(f"| {name} | " + " | ".join(row.values()) + " |" for name, row in rows.items())]) + "\n"


def bases() -> str:
    """A page of the models that configs name: what their headers say."""
    found: dict[str, tuple[str, str, list[str]]] = {}
    for path in sorted(config.folders()[0].rglob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        if not lines[3].startswith("# Not run: it needs a GPU and the weights of "):
            continue
        licence, published = lines[4].removeprefix("# (").removesuffix(".").split("; its card decides). Published: ")
        rule = f"{path.parent.name}/{path.stem}"
        found.setdefault(lines[3].rsplit(" ", 1)[1], (licence, published, []))[2].append(rule)
    rows = [
        f"| {name} | {licence} | {published} | {', '.join(rules)} |"
        for name, (licence, published, rules) in found.items()
    ]
    return BASES + "\n".join(rows) + "\n"


def main() -> None:
    """Try every family, print, and write if asked to."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    started = time.perf_counter()
    rows = {name: probe(name) for name in FAMILIES}
    print(markdown(rows), f"{time.perf_counter() - started:.0f} s", sep="\n")
    if "--write" in sys.argv:
        PAGE.write_text(bases(), encoding="utf-8")
        TABLE.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        text = LISTED.read_text(encoding="utf-8")
        before, rest = text.split(START)
        LISTED.write_text(before + START + markdown(rows) + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
