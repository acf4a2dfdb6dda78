"""The page of an evaluation, `index.html`, beside the samples that it shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffalign.evaluation import found, samples, wording
from diffalign.evaluation.intervals import Interval
from diffalign.evaluation.samples import Drawn
from diffalign.report import charts, pages
from diffalign.report.pictures import small
from diffalign.runtime.files import write_text

if TYPE_CHECKING:
    from diffalign.evaluation.task import Task

PAGE = Path(__file__).parent / "page.html"
DIGITS = 4  # of a sample's score


def write(
    task: Task,
    report: dict[str, Any],
    names: Sequence[str],
    bases: Sequence[int | None],
    drawn: Sequence[Drawn],
    path: Path,
) -> None:
    """Write it. report: what `report.json` holds; names: of the models, in its order; bases: of each the number of its base, or None."""
    verdicts = {name: all(_verdicts(one.scores[name]) for one in drawn) for name in task.rewards}
    values = {
        "report": report,
        "findings": _findings(report, names, bases, verdicts),
        "names": dict(zip((model["label"] for model in report["models"]), names, strict=True)),
        "forests": {name: _forest(report, names, name) for name in task.rewards},
        "data": _data(task, report, names, bases, drawn, verdicts),
    }
    filters: dict[str, Callable[..., Any]] = {
        "shown": _shown,
        "at": found.at,
        "overall": lambda score: found.at(score, report["column"]),
    }
    write_text(path, pages.render(PAGE, filters, **values))


def _verdicts(scores: np.ndarray) -> bool:
    finite = scores[np.isfinite(scores)]
    return bool(len(finite) and np.isin(finite, (0.0, 1.0)).all())


def _shown(interval: Any, form: str = ".3f") -> str:
    return Interval.of(interval).text(form) if isinstance(interval, dict) else ""  # a base model has no gain


def _findings(
    report: dict[str, Any], names: Sequence[str], bases: Sequence[int | None], verdicts: dict[str, bool]
) -> list[str]:
    """A sentence for every model and reward, the first reward's first; of bases only where nothing is held against them."""
    said = []
    for reward in report["rewards"]:
        for k, model in enumerate(report["models"]):
            scores = found.at(model["scores"][reward], report["column"])
            if "gain" in scores:
                gain = Interval.of(scores["gain"])
                said.append(wording.against_base(names[k], reward, gain, verdicts[reward]))
            elif "mean" in scores and bases[k] is None and k not in bases:
                said.append(wording.alone(names[k], reward, Interval.of(scores["mean"]), verdicts[reward]))
    return said or ["No sample has a score."]


def _forest(report: dict[str, Any], names: Sequence[str], reward: str) -> str:
    """Means of the models by a reward with their intervals, one below another; empty where there is none."""
    bars = []
    for name, model in zip(names, report["models"], strict=True):
        if "mean" in (scores := found.at(model["scores"][reward], report["column"])):
            mean = Interval.of(scores["mean"])
            bars.append(charts.Bar(f"{name}: {mean.value:.3f}", mean.value, mean.low, mean.high, "gain" in scores))
    below = f"{reward}, {report['overall']} with its 95 % interval"
    return charts.forest(bars, f"{below}; numbers in the table", below, nothing=None) if bars else ""


def _data(
    task: Task,
    report: dict[str, Any],
    names: Sequence[str],
    bases: Sequence[int | None],
    drawn: Sequence[Drawn],
    verdicts: dict[str, bool],
) -> dict[str, Any]:
    """What the page's script shows samples by: scores by reward, model and row."""
    count, height, width, _ = samples.read(drawn[0].folder, 0).shape
    return {
        "samples": task.samples,
        "size": [count * width, height],  # of a file: frames stand side by side
        "small": small((height, width)),
        "models": [
            {"name": name, "folder": model["label"], "base": base}
            for name, model, base in zip(names, report["models"], bases, strict=True)
        ],
        "rewards": [{"name": name, "verdicts": verdicts[name]} for name in task.rewards],
        "prompts": [{"text": entry["prompt"], "tag": str(entry.get("tag", ""))} for entry in task.entries],
        "scores": [[[_short(value) for value in one.scores[name]] for one in drawn] for name in task.rewards],
    }


def _short(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if np.isfinite(value) else None
