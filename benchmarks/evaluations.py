"""What runs' evaluations say, in one file: python benchmarks/evaluations.py OUT.json HOW NAME=RUN ...

Of every evaluation: the update, and each reward's mean with its gain and that one's 95 % interval over prompts. HOW: a line on how the runs
were made.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from diffalign.evaluation.results import Summary
from diffalign.runs.folder import read_rows
from diffalign.runtime import keys


def evaluations(run: Path) -> list[dict[str, Any]]:
    """Those of one run, in order."""
    found = []
    for row in read_rows(run):
        if keys.COUNT not in row:
            continue
        said: dict[str, Any] = {"update": int(row["update"])}
        for name, judged in Summary.of_row(row).rewards.items():
            gain = judged.gain
            apart = [None if x is None else round(x, 4) for x in (gain.value, gain.low, gain.high)] if gain else None
            said[name] = {"mean": round(judged.value.value, 4), "gain": apart}
        found.append(said)
    return found


def main(out: Path, how: str, runs: dict[str, Path]) -> None:
    """Write them."""
    facts = {"date": time.strftime("%Y-%m-%d"), "how": how, "runs": {n: evaluations(run) for n, run in runs.items()}}
    out.write_text(json.dumps(facts, indent=1) + "\n")
    for name, found in facts["runs"].items():
        print(name, {k: (v["mean"], v["gain"]) for k, v in found[-1].items() if k != "update"})


if __name__ == "__main__":
    place, words, *named = sys.argv[1:]
    main(Path(place), words, {name: Path(run) for name, _, run in (each.partition("=") for each in named)})
