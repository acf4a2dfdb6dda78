"""What a run logs in metrics.jsonl, for docs/metrics.md. A test trains every rule and holds that each key has a row here."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from tools.docs.markdown import table

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "metrics.json"


@dataclass(frozen=True)
class Row:
    """A key, NAME and A-B standing for what differs; what it is; when it is in order; what to do where it is not."""

    key: str
    what: str
    healthy: str
    else_: str

    def matches(self, key: str) -> bool:
        """Whether a logged key is this one."""
        pattern = re.escape(self.key).replace("NAME", ".+").replace("A\\-B", r"\d+-\d+")
        return re.fullmatch(pattern, key) is not None


def _read() -> dict[str, list[Row]]:
    parts = yaml.safe_load((Path(__file__).parent / "metrics.yaml").read_text(encoding="utf-8"))
    return {
        part: [Row(key, said["what"], said["healthy"], said["else"]) for key, said in keys.items()]
        for part, keys in parts.items()
    }


PARTS = _read()
ROWS = [row for part in PARTS.values() for row in part]
HEAD = ("key", "what it is", "in order", "else")


def rows(part: str) -> list[str]:
    """A table of a part's keys."""
    return table(HEAD, ((f"`{row.key}`", row.what, row.healthy, row.else_) for row in PARTS[part]))


def measured() -> list[str]:
    """What runs had: a column a run, 5 to 95 % of the updates' values."""
    return _spreads("runs")


def broken() -> list[str]:
    """The same of runs whose learning rate was a hundred times too high."""
    return _spreads("broken")


def _spreads(kind: str) -> list[str]:
    runs = json.loads(RESULTS.read_text(encoding="utf-8"))[kind]
    keys = [row.key for row in (*PARTS["learning"], *PARTS["rules"]) if any(row.key in run["keys"] for run in runs)]
    body = ((f"`{key}`", *(_spread(run["keys"].get(key)) for run in runs)) for key in keys)
    return table(("", *(f"{run['name']}, {run['updates']} updates" for run in runs)), body)


def _spread(found: dict[str, float] | None) -> str:
    if found is None:
        return "-"
    low, high = f"{found['5%']:.3g}", f"{found['95%']:.3g}"
    return low if low == high else f"{low} to {high}"
