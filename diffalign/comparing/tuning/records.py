"""What was tried, as a table, JSON and CSV; and each method's best settings as a config."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, dataclass
from typing import Any

import diffalign
from diffalign import config as configs
from diffalign.comparing.methods import Method
from diffalign.comparing.tuned import BEST, FACTS, budget_said, range_said
from diffalign.comparing.tuning.folder import REWARD, VALIDATION, Tuning
from diffalign.comparing.tuning.study import SCORE, SPENT, VALUES, WHY, Study
from diffalign.comparing.words import KINDS
from diffalign.errors import shortened
from diffalign.evaluation.intervals import Interval
from diffalign.runtime.files import write_text


@dataclass(frozen=True)
class Record:
    """A trial that ended. score: its gain, None where it failed; why: it did."""

    number: int
    values: dict[str, float]
    score: Interval | None
    why: str
    spent: dict[str, float]


def read(tuning: Tuning) -> dict[str, list[Record]]:
    """Trials that ended, by a method's folder."""
    found: dict[str, list[Record]] = {}
    for method in tuning.methods:
        ended = [trial for trial in Study(tuning, method).begun() if trial.state.is_finished()]
        found[method.folder] = [
            Record(
                trial.number,
                trial.user_attrs[VALUES],
                Interval.of(trial.user_attrs[SCORE]) if SCORE in trial.user_attrs else None,
                trial.user_attrs.get(WHY, ""),
                trial.user_attrs[SPENT],
            )
            for trial in ended
        ]
    return found


def best(records: list[Record]) -> tuple[Record, Interval] | None:
    """The one with the highest score, the first of several; None where all failed."""
    scored = [(record, record.score) for record in records if record.score is not None]
    return max(scored, key=lambda pair: (pair[1].value, -pair[0].number), default=None)


def barren(tuning: Tuning) -> list[str]:
    """Methods all of whose trials failed."""
    found = read(tuning)
    return [method.label for method in tuning.methods if best(found[method.folder]) is None]


def write(tuning: Tuning) -> list[str]:
    """Write everything; what to print."""
    found = read(tuning)
    chosen = [_chosen(tuning, method, found[method.folder]) for method in tuning.methods]
    facts = {
        "diffalign": diffalign.__version__,
        "budget": dict([tuning.asked.budget]),
        "captions": captions(tuning),
        "judge": tuning.asked.judge or REWARD,
        "seed": tuning.asked.seed,
        "methods": [
            {
                "label": method.label,
                "ranges": [asdict(each) for each in tuning.ranges[method.folder]],
                "trials": [_plain(record) for record in found[method.folder]],
                "best": None if (top := best(found[method.folder])) is None else top[0].number,
            }
            for method in tuning.methods
        ],
    }
    write_text(tuning.place / "trials.json", json.dumps(facts, indent=1, allow_nan=False) + "\n")
    write_text(tuning.place / "trials.csv", _csv(tuning, found))
    head = f"gain of {tuning.asked.judge or REWARD} on {captions(tuning)} captions after {budget_said(dict([tuning.asked.budget]))}"
    return [f"{head}, 95 % intervals over these:", "", *table(tuning, found), "", *(line for line in chosen if line)]


def captions(tuning: Tuning) -> str:
    """What trials are judged on: `validation`, or a file."""
    return VALIDATION if tuning.asked.on == VALIDATION else f"{tuning.asked.on}'s"


def _chosen(tuning: Tuning, method: Method, records: list[Record]) -> str:
    """Write a method's best settings as a config, with what was tried beside it; a line that says so."""
    if (top := best(records)) is None:
        return f"{method.label}: every trial failed"
    record, score = top
    folder = tuning.place / method.folder
    facts = {
        "diffalign": diffalign.__version__,
        "trials": len(records),
        "failed": sum(each.score is None for each in records),
        "budget": dict([tuning.asked.budget]),
        "captions": captions(tuning),
        "judge": tuning.asked.judge or REWARD,
        "seed": tuning.asked.seed,
        "ranges": [asdict(each) for each in tuning.ranges[method.folder]],
        "best": _plain(record),
    }
    write_text(folder / FACTS, json.dumps(facts, indent=1, allow_nan=False) + "\n")
    write_text(folder / BEST, configs.dump(tuning.config(method, record.values, trial=False)))
    if len(records) > 1 and all(each.score is not None and each.score.value == score.value for each in records):
        return f"{method.label}: all trials gain the same: this budget tells nothing apart, and {folder / BEST} is the config as it is"
    of = f"trial {record.number} of {len(records)}{', the config as it is' if record.number == 0 else ''}"
    return f"{method.label}: {of}, gain {score.text('+.3f')}: {folder / BEST}"


def _plain(record: Record) -> dict[str, Any]:
    score = None if record.score is None else record.score.facts()
    return {
        "trial": record.number,
        "settings": record.values,
        "score": score,
        "failed": record.score is None,
        "why": record.why,
        "spent": record.spent,
    }


def table(tuning: Tuning, found: dict[str, list[Record]]) -> list[str]:
    """A line a trial, and a star at each method's best."""
    rows = [("method", "trial", "gain", "settings")]
    for method in tuning.methods:
        top = best(found[method.folder])
        for record in found[method.folder]:
            star = "*" if top is not None and record is top[0] else ""
            said = f"failed: {shortened(record.why, 60)}" if record.score is None else record.score.text("+.3f")
            values = "  ".join(f"{key}={value:.4g}" for key, value in record.values.items())
            rows.append((method.label, f"{record.number}{star}", said, values))
    widths = [max(len(row[k]) for row in rows) for k in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    spans = [
        f"{method.label}: {', '.join(range_said(asdict(each)) for each in tuning.ranges[method.folder])}"
        for method in tuning.methods
    ]
    return [*lines, "", *spans]


def _csv(tuning: Tuning, found: dict[str, list[Record]]) -> str:
    keys = dict.fromkeys(each.key for method in tuning.methods for each in tuning.ranges[method.folder])
    heads = ["method", "trial", *keys, "score", "low", "high", "failed", *KINDS, "why"]
    text = io.StringIO()
    writer = csv.DictWriter(text, heads, lineterminator="\n")
    writer.writeheader()
    for method in tuning.methods:
        for record in found[method.folder]:
            score = {} if record.score is None else record.score.facts()
            row = {"method": method.label, "trial": record.number, **record.values, **record.spent}
            row |= {"score": score.get("mean"), "low": score.get("low"), "high": score.get("high")}
            writer.writerow({**row, "failed": record.score is None, "why": record.why})
    return text.getvalue()
