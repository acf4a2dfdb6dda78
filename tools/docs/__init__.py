"""`python -m tools.docs [--write]`: everything in the repository that is made from the code. Tests hold it equal.

Without --write it says which files differ. Pages are written by hand; what stands in one between `<!-- made: NAME -->` and
`<!-- end -->` is the part of that name, below.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from diffalign.config import json_schema, marks
from diffalign.rules import RULES
from tools.docs import compared, families, keys, messages, metrics, tables
from tools.made import ROOT, keep

PART = re.compile(r"(<!-- made: (.+?) -->\n).*?(<!-- end -->)", re.S)
COMPARED = ("shapes_sd3", "shapes_sd", "shapes_sd3_vgrpo", "shapes_sd3_seconds")
FAMILY = (families.facts, families.cards, families.tried)
PARTS: dict[str, Callable[[], list[str]]] = {
    "keys": keys.sections,
    **{f"keys of {name}": (lambda name=name: keys.of_rule(name)) for name in RULES},
    "marks": marks.table,
    "decided": families.decided,
    "rules": tables.rules,
    "ranges": tables.ranges,
    **{f"rules compared on {model}": (lambda model=model: compared.methods(model)) for model in COMPARED},
    **{f"pairs told apart on {model}": (lambda model=model: compared.resolved(model)) for model in COMPARED},
    "four times the updates": compared.fourfold,
    "few step rules": compared.few_step_rules,
    "second generation compared": compared.second,
    "second generation against the first": compared.planned,
    "rewards": tables.rewards,
    "presets": tables.presets,
    "embedded pipelines": tables.embedded,
    "few steps": tables.few_steps,
    **{f"metrics of {part}": (lambda part=part: metrics.rows(part)) for part in metrics.PARTS},
    "metrics measured": metrics.measured,
    "metrics broken": metrics.broken,
    **{
        f"{part.__name__} of {page}": (lambda part=part, page=page: part(page))
        for page in families.PAGES
        for part in FAMILY
    },
    "exit codes": messages.exit_codes,
    "faults": messages.faults,
    "mistakes": messages.mistakes,
}


def pages() -> list[Path]:
    """The pages of docs/."""
    return sorted((ROOT / "docs").rglob("*.md"))


def made() -> dict[Path, str]:
    """Every file that is made, or has a made part: its path in the repository and its text."""
    found = {Path("configs") / json_schema.FILE: json_schema.text()}
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if PART.search(text):
            found[page.relative_to(ROOT)] = PART.sub(_part, text)
    return found


def used() -> list[str]:
    """The names of the parts that stand in some page."""
    return [name for page in pages() for _, name, _ in PART.findall(page.read_text(encoding="utf-8"))]


def _part(found: re.Match[str]) -> str:
    lines = PARTS[found[2]]()
    return found[1] + "".join(f"{line}\n" for line in lines) + found[3]


def main(write: bool) -> int:
    """Write the files, or say which differ; the exit code is how many do."""
    return keep(made(), write)
