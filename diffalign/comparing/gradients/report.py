"""Table, JSON and figure of what was measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.comparing.gradients.laboratory import Measured
from diffalign.evaluation.intervals import Interval
from diffalign.report import drawing
from diffalign.report.drawing import figures, plain_ticks
from diffalign.runtime.files import write_text

HEADS = (
    "rule",
    "bias [95 %]",
    "cosine [95 %]",
    "variance",
    "rows",
    "seconds",
    "graph MiB",
    "signal/noise",
    "per second",
)


def rows(measured: Sequence[Measured]) -> list[tuple[str, ...]]:
    """One row of text a rule."""
    return [
        (
            item.label,
            resolved(item, Interval(item.bias, item.bias_low, item.bias_high)),
            resolved(item, Interval(item.cosine, item.cosine_low, item.cosine_high)),
            f"{item.variance:.3g}",
            f"{item.rows_forward:.0f} + {item.rows_backward:.0f}",
            f"{item.seconds:.3g}",
            f"{item.peak_bytes / 2**20:.3g}",
            f"{item.signal_to_noise:.3g}",
            f"{item.signal_to_noise_per_second:.3g}",
        )
        for item in measured
    ]


def resolved(item: Measured, found: Interval) -> str:
    """A number with its interval, or that noise hides it and what would do."""
    if found.known:
        return found.text()
    more = "many more" if item.enough is None else f"{max(item.enough, 2 * item.batches)}"
    return f"not resolved ({more} batches would do)"


def table(measured: Sequence[Measured]) -> list[str]:
    """The rows as aligned text."""
    cells = [HEADS, *rows(measured)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(HEADS))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def save(path: Path, measured: Sequence[Measured], **facts: Any) -> None:
    """Everything as JSON."""
    rules = [{k: None if v != v else v for k, v in asdict(item).items()} for item in measured]  # JSON has no NaN
    write_text(path, json.dumps({**facts, "rules": rules}, indent=1, allow_nan=False) + "\n")


def figure(measured: Sequence[Measured], contributions: Sequence[float], path: Path, title: str) -> None:
    """Bias, variance, cost, and where in the chain the gradient and each rule's terms lie."""
    with figures([title, *(item.label for item in measured)]) as plt:
        colours = [plt.get_cmap("tab10")(k % 10) for k in range(len(measured))]
        places, names = np.arange(len(measured))[::-1], [item.label for item in measured]
        figure, axes = plt.subplots(
            2, 2, figsize=(10, 4 + 0.32 * len(measured)), height_ratios=(0.32 * len(measured), 2.4)
        )
        bias, spread, steps, cost = axes.flat
        for item, place, colour in zip(measured, places, colours, strict=True):
            if item.bias_low is None or item.bias_high is None:
                continue  # not resolved
            ends = [[item.bias - item.bias_low], [item.bias_high - item.bias]]
            bias.errorbar([item.bias], [place], xerr=ends, fmt="o", color=colour, capsize=3)
        bias.axvline(0, color="grey", linewidth=0.8)
        bias.set_title("relative bias, 95 % interval (left of 0: less than noise)", fontsize=9)
        spread.barh(places, [item.variance for item in measured], color=colours)
        spread.set_xscale("log")
        plain_ticks(spread.xaxis)
        spread.set_title("variance of one sample's gradient (trace)", fontsize=9)
        for axis, labels in ((bias, names), (spread, [""] * len(names))):
            axis.set_yticks(places, labels, fontsize=8)
            axis.grid(axis="x", alpha=0.3)
        _steps(steps, measured, contributions, colours)
        for item, colour in zip(measured, colours, strict=True):
            cost.scatter(item.seconds, item.peak_bytes / 2**20, color=colour, s=40)
        cost.set_xlabel("seconds a batch", fontsize=8)
        cost.set_title("memory of a gradient, MiB", fontsize=9)
        cost.set_ylim(bottom=0)
        cost.set_xlim(left=0)
        cost.grid(alpha=0.3)
        figure.suptitle(title, fontsize=9)
        figure.tight_layout()
        drawing.save(figure, path, 130)


def _steps(axis: Any, measured: Sequence[Measured], contributions: Sequence[float], colours: Sequence[Any]) -> None:
    """Norms by step: of what the exact gradient is made of, and of each rule's terms on one batch, noise included."""
    axis.plot(contributions, color="black", marker="o", markersize=3, label="exact gradient: each step's part")
    for item, colour in zip(measured, colours, strict=True):
        axis.plot([np.nan if v is None else v for v in item.term_norm], color=colour, marker=".", linewidth=1)
    axis.set_yscale("log")
    plain_ticks(axis.yaxis)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("step", fontsize=8)
    axis.set_title("gradient norm by step: terms of one batch, and the exact parts", fontsize=9)
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)
