"""What an evaluation found of each model, as plain data: means with intervals, of all and of parts of the prompts, and paired gains."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from diffalign.evaluation import intervals, samples
from diffalign.evaluation.intervals import Interval
from diffalign.evaluation.samples import Drawn
from diffalign.rewards import distances, families
from diffalign.sampling import adapters, sources
from diffalign.types import Floats

if TYPE_CHECKING:
    from diffalign.evaluation.task import Task


def rows(
    task: Task, labels: Sequence[str], models: Sequence[sources.Source], drawn: Sequence[Drawn]
) -> list[dict[str, Any]]:
    """One model's results each; gains are paired with the base's samples of the same noise."""
    bases = [base(models, number) for number in range(len(models))]
    return [
        _row(task, label, model, own, None if other is None else drawn[other])
        for label, model, own, other in zip(labels, models, drawn, bases, strict=True)
    ]


def trained_on(model: sources.Source) -> list[str]:
    """The rewards that a model's adapters were trained on, as far as their files say."""
    return list(dict.fromkeys(name for adapter in model.adapters for name in adapters.notes(adapter).rewards))


def warning(task: Task, trained: Sequence[str]) -> str:
    """What to say where no judge is of another family than what was trained on; empty otherwise."""
    return families.warning(task.rewards, trained, "judge with one of another family too, --judges NAME,...")


def at(score: dict[str, Any], column: str | None, part: str | None = None) -> dict[str, Any]:
    """Of a judge's results those of a part of a column, of the mean of a column's means, or of all samples; empty where there are none."""
    if column is None:
        return score
    by = score.get("by", {}).get(column, {})
    return by if part is None else by.get("parts", {}).get(part, {})


def base(models: Sequence[sources.Source], number: int) -> int | None:
    """The number of what a model with adapters is held against: the same model and call without."""
    own = models[number]
    if not own.adapters:
        return None
    for place, other in enumerate(models):
        if not other.adapters and (other.model, other.call, other.revision, other.weights) == (
            own.model,
            own.call,
            own.revision,
            own.weights,
        ):
            return place
    return None


def _row(task: Task, label: str, model: sources.Source, own: Drawn, base: Drawn | None) -> dict[str, Any]:
    prompt, trained = task.prompt, trained_on(model)
    pictures = _thumbnails(task, own)
    row = {
        "label": label,
        "model": model.model,
        "adapters": [f"{a.folder} at {a.strength:g}" for a in model.adapters],
        "trained_on": trained,
        "warning": warning(task, trained),
        "call": {key: value for key, value in model.call.items() if key != "sigmas"},
        **({} if model.fps is None else {"fps": model.fps}),
        "scores": {
            name: _score(task, values, None if base is None else base.scores[name])
            | {"mark": families.mark(name, trained)}
            for name, values in own.scores.items()
        },
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


def _score(task: Task, values: Floats, before: Floats | None) -> dict[str, Any]:
    """A judge's results on one model: of all samples, and by each column of the suite."""
    unscored = {"unscored": int((~np.isfinite(values)).sum())}
    if unscored["unscored"] == len(values):
        return unscored
    prompt = task.prompt
    base = np.full_like(values, np.nan) if before is None else before
    paired = bool(np.isfinite(values - base).any())

    def cell(mean: Interval, gain: Callable[[], Interval]) -> dict[str, Any]:
        return {"mean": mean.facts()} | ({"gain": gain().facts()} if paired else {})

    def part(chosen: Any) -> dict[str, Any]:
        own = prompt[chosen]
        return cell(intervals.mean(values[chosen], own), lambda: intervals.gain(values[chosen], base[chosen], own))

    by = {
        column: {
            **cell(
                intervals.mean_of_means(values, prompt, which),
                functools.partial(intervals.mean_of_means, values - base, prompt, which),
            ),
            "parts": {name: part(which == number) for number, name in enumerate(names)},
        }
        for column, (which, names) in task.columns().items()
    }
    whole = cell(intervals.mean(values, prompt), lambda: intervals.gain(values, base, prompt))
    return whole | unscored | ({"by": by} if by else {})


def _thumbnails(task: Task, drawn: Drawn) -> np.ndarray:
    return np.concatenate([distances.thumbnails(samples.read(drawn.folder, row)[None]) for row in range(task.total)])
