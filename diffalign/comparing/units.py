"""What a unit's run folder says: evaluations, what they had cost, training rewards. Reads files only, wherever they are. Needs no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffalign import config as configs
from diffalign.comparing.methods import Unit, shared
from diffalign.errors import Fault, UserError
from diffalign.evaluation.results import Evaluation
from diffalign.runs.folder import CONFIG
from diffalign.runs.logs import read_rows
from diffalign.runs.resume import DECIDED
from diffalign.runtime import keys, numbered
from diffalign.runtime.yaml_text import parse
from diffalign.types import Floats

WIDTH = 10  # updates in the running mean of a training reward


@dataclass(frozen=True)
class Found:
    """Of a unit that came to its end.

    evaluations: by update, the first before training; spent: by update and kind, up to an evaluation; reward: (update, mean over samples)
    of the training reward; memory_gib: the most that was allocated on a card, None elsewhere; asked: what tells evaluations of other
    images apart.
    """

    unit: Unit
    evaluations: dict[int, Evaluation]
    spent: dict[int, dict[str, float]]
    reward: list[tuple[int, float]]
    memory_gib: float | None
    asked: str

    @property
    def updates(self) -> int:
        """How many there were."""
        return max(self.evaluations)

    def after(self, judge: str) -> Floats:
        """The last evaluation's scores (n,)."""
        return self.evaluations[self.updates].scores[judge]

    def change(self, judge: str) -> Floats:
        """Those less the first evaluation's (n,)."""
        return self.after(judge) - self.evaluations[min(self.evaluations)].scores[judge]

    def known(self, kind: str) -> list[int]:
        """After which updates it was evaluated, and what had been spent of a kind is known."""
        return [k for k in sorted(self.evaluations) if kind == "updates" or kind in self.spent.get(k, {})]

    def curve(self, judge: str, kind: str) -> tuple[list[float], list[float]]:
        """What was spent up to each of those, and the mean score."""
        known = self.known(kind)
        scores = [float(np.nanmean(self.evaluations[k].scores[judge])) for k in known]
        return [float(k) if kind == "updates" else self.spent[k][kind] for k in known], scores

    def rewards(self) -> tuple[float | None, float | None]:
        """The training reward's running mean at the end, and at its best."""
        values = np.array([value for _, value in self.reward])
        if not len(values):
            return None, None
        width = min(WIDTH, len(values))
        smooth = np.convolve(values, np.full(width, 1 / width), "valid")
        return float(smooth[-1]), float(smooth.max())


def read(unit: Unit) -> Found | str:
    """What a unit's folder holds; or why it does not count."""
    if not unit.place.is_dir():
        return "not begun"
    if not unit.finished:
        return "not finished"
    try:
        if differ := _differences(unit):
            return f"was trained with other settings: {', '.join(differ)}"
        files = numbered.files(unit.place / "evaluation", ".json")
        evaluations = {update: Evaluation.read(path) for update, path in files.items()}
        asked = {_asked(path) for path in files.values()}
    except (Fault, UserError) as error:
        return str(error)
    if 0 not in evaluations or len(evaluations) < 2:
        return "lacks its evaluation before training, or after"
    if len(asked) > 1:
        return "its evaluations are of different images"
    rows = read_rows(unit.place)
    spent = {
        row["update"]: {kind: row[key] for kind, key in keys.SPENT.items() if key in row}
        for row in rows
        if keys.COUNT in row
    }
    memory = [row["memory_gib"] for row in rows if "memory_gib" in row]
    reward = [(row["update"], row[keys.TOTAL]) for row in rows if keys.TOTAL in row]
    return Found(unit, evaluations, spent, reward, max(memory, default=None), asked.pop())


def _asked(path: Path) -> str:
    facts: dict[str, Any] = json.loads(path.read_bytes())
    return json.dumps([facts.get("seed"), facts.get("prompts"), facts["group"]])


def _differences(unit: Unit) -> list[str]:
    """Settings of a run that are not its method's; what may change freely when a run goes on may have."""
    written = parse((unit.place / CONFIG).read_text(encoding="utf-8"), str(unit.place / CONFIG))
    differ = configs.differences(unit.method.settings, shared(written))
    counts = [key for key in differ if key == "updates" or key.startswith("budget.") or configs.mark(key) != "free"]
    return [f"{key}: {differ[key][0]!r} -> {differ[key][1]!r}" for key in counts if key not in DECIDED]
