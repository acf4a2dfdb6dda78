"""What an evaluation found: numbers as JSON, grids on the same noises, and a page to look at."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from diffalign import __version__
from diffalign.evaluation import intervals, samples
from diffalign.evaluation.intervals import Interval
from diffalign.evaluation.samples import Drawn
from diffalign.prompts.book import same_text
from diffalign.report import pages, pictures
from diffalign.report.pictures import strips
from diffalign.rewards import distances
from diffalign.runtime.files import write_text
from diffalign.sampling import sources

if TYPE_CHECKING:
    from diffalign.evaluation.task import Task

PAGE = Path(__file__).parent / "page.html"
SHOWN = 6  # prompts, and samples of each, in the grid


def write(
    task: Task, labels: list[str], models: Sequence[sources.Source], drawn: Sequence[Drawn | None], out: Path
) -> Path:
    """Write `report.json`, `scores.jsonl`, `grid.png` and `index.html`; returns the page."""
    whole = [one for one in drawn if one is not None]
    rows = [
        _row(task, label, model, one, _base(models, whole, number))
        for number, (label, model, one) in enumerate(zip(labels, models, whole, strict=True))
    ]
    report = {
        "prompts": {"source": task.source, "split": task.split, "count": len(task.entries), "digest": task.digest()},
        "samples_per_prompt": task.samples,
        "seed": task.seed,
        "drawn_at_once": _batches(task, whole),
        "rewards": list(task.rewards),
        "diffalign": __version__,
        "models": rows,
    }
    write_text(out / "report.json", json.dumps(report, indent=1) + "\n")
    write_text(out / "scores.jsonl", "".join(json.dumps(line) + "\n" for line in _lines(task, labels, whole)))
    _grid(task, whole).save(out / "grid.png")
    _page(task, report, labels, whole, out / "index.html")
    return out / "index.html"


def _batches(task: Task, drawn: Sequence[Drawn]) -> list[int]:
    """How many samples were drawn at a time; of samples of older versions that is not known."""
    sizes = np.array([samples.batch(one.folder, row) for one in drawn for row in range(task.total)])
    return sorted({int(size) for size in sizes[np.isfinite(sizes)]})


def _base(models: Sequence[sources.Source], drawn: Sequence[Drawn], number: int) -> Drawn | None:
    """What a model with adapters is held against: the same model and call without."""
    own = models[number]
    if not own.adapters:
        return None
    for other, drawn_without in zip(models, drawn, strict=True):
        if not other.adapters and (other.model, other.call, other.revision, other.weights) == (
            own.model,
            own.call,
            own.revision,
            own.weights,
        ):
            return drawn_without
    return None


def groups(task: Task) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Prompt and task of every sample (total,), and the names of the tasks, in the order of the prompts."""
    names = list(dict.fromkeys(str(entry.get("tag", "")) for entry in task.entries))
    tags = np.array([names.index(str(entry.get("tag", ""))) for entry in task.entries])
    places = np.repeat(np.arange(len(task.entries)), task.samples)
    return same_text(task.entries)[places], tags[places], names


def _row(task: Task, label: str, model: sources.Source, own: Drawn, base: Drawn | None) -> dict[str, Any]:
    """One model's results; gains are paired with the base's samples of the same noise."""
    prompt, tag, names = groups(task)
    scores: dict[str, Any] = {}
    for name, values in own.scores.items():
        if not np.isfinite(values).any():
            scores[name] = {"unscored": len(values)}
            continue
        entry: dict[str, Any] = {
            "mean": intervals.mean(values, prompt).facts(),
            "unscored": int((~np.isfinite(values)).sum()),
        }
        if len(names) > 1:
            parts = {n: intervals.mean(values[tag == k], prompt[tag == k]).facts() for k, n in enumerate(names)}
            entry |= {"tasks": parts, "mean_of_tasks": intervals.mean_of_means(values, prompt, tag).facts()}
        if base is not None:
            entry["gain"] = intervals.gain(values, base.scores[name], prompt).facts()
            gains = values - base.scores[name]
            if len(names) > 1 and np.isfinite(gains).any():
                entry["gain_of_tasks"] = intervals.mean_of_means(gains, prompt, tag).facts()
        scores[name] = entry
    pictures = _thumbnails(task, own)
    row = {
        "label": label,
        "model": model.model,
        "adapters": [f"{a.folder} at {a.strength:g}" for a in model.adapters],
        "call": {key: value for key, value in model.call.items() if key != "sigmas"},
        "scores": scores,
    }
    if task.samples > 1:
        row["diversity"] = intervals.hall(distances.diversity(pictures, prompt), prompt).facts()
    if base is not None:
        apart = distances.drift(pictures, _thumbnails(task, base))
        row["drift"] = intervals.hall(apart, prompt).facts()
        apart = np.array([samples.drift(own.folder, k) for k in range(task.total)])
        if np.isfinite(apart).any():
            row["prediction_drift"] = intervals.hall(apart, prompt).facts()
    return row


def _thumbnails(task: Task, drawn: Drawn) -> np.ndarray:
    return np.concatenate([distances.thumbnails(samples.read(drawn.folder, row)[None]) for row in range(task.total)])


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
    chosen = np.linspace(0, len(task.entries) - 1, min(SHOWN, len(task.entries))).astype(int)
    return [[int(p) * task.samples + k for k in range(min(SHOWN, task.samples))] for p in chosen]


def _grid(task: Task, drawn: Sequence[Drawn]) -> Image.Image:
    """For every shown prompt a row of each model's samples, same noises below one another."""
    rows = [samples.read(one.folder, row) for part in _shown(task) for one in drawn for row in part]
    shots = pictures.framed([strips(frames[None])[0] for frames in rows])
    return pictures.grid(shots, columns=min(SHOWN, task.samples))


def _page(task: Task, report: dict[str, Any], labels: Sequence[str], drawn: Sequence[Drawn], path: Path) -> None:
    def shown(interval: Any) -> str:
        if not isinstance(interval, dict):  # a base model has no gain
            return ""
        return Interval.of(interval).text()

    groups_shown = [
        {
            "prompt": task.entries[part[0] // task.samples]["prompt"],
            "models": [
                {
                    "label": label,
                    "files": [{"name": f"{label}/{row:06d}.png", "scores": _scores(one, row)} for row in part],
                }
                for label, one in zip(labels, drawn, strict=True)
            ],
        }
        for part in _shown(task)
    ]
    write_text(path, pages.render(PAGE, {"shown": shown}, report=report, groups=groups_shown))


def _scores(drawn: Drawn, row: int) -> str:
    return ", ".join(f"{name} {values[row]:.3g}" for name, values in drawn.scores.items())
