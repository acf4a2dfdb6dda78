"""What runs logged, as ranges: python benchmarks/metrics.py OUT.json runs NAME=RUN... broken NAME=RUN...

Of every number in metrics.jsonl that does not depend on the machine, 5 %, 50 % and 95 % over updates. docs/metrics.md shows it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from diffalign.runs.logs import read_rows

LEFT_OUT = ("update", "seconds/", "nfe", "memory_gib", "eval/")


def spread(run: Path) -> dict[str, Any]:
    """One run's numbers."""
    rows = [row for row in read_rows(run) if "seconds/total" in row]
    values: dict[str, list[float]] = {}
    for row in rows:
        for key, value in row.items():
            if not key.startswith(LEFT_OUT):
                values.setdefault(key, []).append(value)
    keys = {
        key: {name: float(np.quantile(found, at)) for name, at in (("5%", 0.05), ("50%", 0.5), ("95%", 0.95))}
        for key, found in values.items()
    }
    config = yaml.safe_load((run / "config.yaml").read_text())
    return {
        "updates": len(rows),
        "rule": config["rule"],
        "lr": config["optimizer"]["lr"],
        "model": config["model"],
        "rewards": config["rewards"],
        "keys": keys,
    }


def main(out: Path, words: list[str]) -> None:
    """Write them; a word without = begins a list."""
    found: dict[str, Any] = {"torch": torch.__version__, "command": "python benchmarks/metrics.py"}
    kind = ""
    for word in words:
        name, equals, run = word.partition("=")
        if not equals:
            kind = word
            found[kind] = []
            continue
        found[kind].append({"name": name, **spread(Path(run))})
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
