"""What an evaluation found: numbers as JSON, grids on the same noises, and a page to look at."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from diffalign import __version__
from diffalign.evaluation import found, naming, page, samples, tables
from diffalign.evaluation.samples import Drawn
from diffalign.report import pictures
from diffalign.report.pictures import spread, strips
from diffalign.rewards import catalog
from diffalign.runtime.files import write_text
from diffalign.sampling import sources
from diffalign.types import Integers

if TYPE_CHECKING:
    from diffalign.evaluation.task import Task

SHOWN = 6  # prompts, and samples of each, in the grid


def write(
    task: Task, labels: list[str], models: Sequence[sources.Source], drawn: Sequence[Drawn | None], out: Path
) -> Path:
    """Write `report.json`, `table.csv`, `table.tex`, `scores.jsonl`, `grid.png` and `index.html`; returns the page."""
    whole = [one for one in drawn if one is not None]
    bases = [found.base(models, number) for number in range(len(models))]
    report = {
        "suite": task.name,
        "prompts": {"source": task.source, "split": task.split, "count": len(task.entries), "digest": task.digest()}
        | ({} if task.copy is None else {"published": asdict(task.copy)}),
        "samples_per_prompt": task.samples,
        "seed": task.seed,
        "drawn_at_once": _batches(task, whole),
        "rewards": list(task.rewards),
        "judges": {name: _judge(name) for name in task.rewards},
        "columns": {column: _prompts(task, *values) for column, values in task.columns().items()},
        "column": task.overall,
        "overall": f"mean of the means by {task.overall}" if task.overall else "mean over samples",
        "comparable": task.comparable,
        "diffalign": __version__,
        "models": found.rows(task, labels, models, whole),
    }
    write_text(out / "report.json", json.dumps(report, indent=1) + "\n")
    write_text(out / "table.csv", tables.text(report))
    write_text(out / "table.tex", tables.latex(report))
    write_text(out / "scores.jsonl", "".join(json.dumps(line) + "\n" for line in _lines(task, labels, whole)))
    _grid(task, whole).save(out / "grid.png")
    page.write(task, report, naming.names(models), bases, whole, out / "index.html")
    return out / "index.html"


def _prompts(task: Task, which: Integers, names: list[str]) -> dict[str, int]:
    """How many prompts a column's values have."""
    return {name: len(np.unique(task.prompt[which == number])) for number, name in enumerate(names)}


def _judge(name: str) -> dict[str, str]:
    """What stands in the footer of a judge: where its weights are, under which licence, what it learned from."""
    entry = catalog.find(name)
    return {"weights": entry.place or entry.weights, "licence": entry.licence, "family": entry.family}


def _batches(task: Task, drawn: Sequence[Drawn]) -> list[int]:
    """How many samples were drawn at a time; of samples of older versions that is not known."""
    sizes = np.array([samples.batch(one.folder, row) for one in drawn for row in range(task.total)])
    return sorted({int(size) for size in sizes[np.isfinite(sizes)]})


def _lines(task: Task, labels: Sequence[str], drawn: Sequence[Drawn]) -> list[dict[str, Any]]:
    """One object a sample: its model, prompt, seed, file and scores, null where there is none."""
    lines = []
    for label, one in zip(labels, drawn, strict=True):
        for row in range(task.total):
            entry = task.entries[row // task.samples]
            scores = {name: float(v[row]) if np.isfinite(v[row]) else None for name, v in one.scores.items()}
            facts = {"prompt": entry["prompt"], "tag": entry.get("tag"), "seed": task.seed_of(row)}
            lines.append({"model": label, **facts, "file": f"{label}/{row:06d}.png", "scores": scores})
    return lines


def _shown(task: Task) -> list[list[int]]:
    """Rows of the samples that the grid shows, by prompt."""
    chosen = spread(len(task.entries), SHOWN)
    return [[int(p) * task.samples + k for k in range(min(SHOWN, task.samples))] for p in chosen]


def _grid(task: Task, drawn: Sequence[Drawn]) -> Image.Image:
    """For every shown prompt a row of each model's samples, same noises below one another."""
    rows = [samples.read(one.folder, row) for part in _shown(task) for one in drawn for row in part]
    shots = pictures.framed([strips(frames[None])[0] for frames in rows])
    return pictures.grid(shots, columns=min(SHOWN, task.samples))
