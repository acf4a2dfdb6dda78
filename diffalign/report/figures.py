"""Figures of a run: the same samples before and after, and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.errors import shortened
from diffalign.report.drawing import figures, save
from diffalign.report.pictures import Pixels

Points = list[tuple[float, float, float, float]]  # update, value, low, high

DOTS = 100  # pixels an inch
LEAST, MOST = 128, 256  # pixels that a picture is drawn with; a strip of a video's frames is drawn twice as wide
WIDE = 1240  # pixels of the whole, about
GAP, LINE = 8, 14  # pixels between pictures, and of a line of text


def before_after(
    before: Pixels, after: Pixels, captions: Sequence[str], passed: tuple[Any, Any] | None, path: Path, title: str
) -> None:
    """The same prompts and seeds before and after training, side by side; a frame is green where the gold reward passes."""
    height, width = before.shape[1:3]
    across = min(max(width, LEAST), MOST) if width <= 1.5 * height else min(max(width, LEAST), 2 * MOST)
    down = round(across * height / width)
    pairs = max(1, min(WIDE // (2 * (across + GAP)), len(captions)))
    rows = -(-len(captions) // pairs)
    whole = (max(pairs * 2 * (across + GAP) + GAP, 500), rows * (down + 3 * LINE + GAP) + 2 * LINE)
    fits = int(2 * across / 5.2)  # letters of seven points
    with figures([title, *captions]) as plt:
        figure = plt.figure(figsize=(whole[0] / DOTS, whole[1] / DOTS), dpi=DOTS)
        for k, caption in enumerate(captions):
            left = GAP + k % pairs * 2 * (across + GAP)
            top = whole[1] - 2 * LINE - k // pairs * (down + 3 * LINE + GAP)
            text = caption.removeprefix("a photo of ").replace("\n", " ")
            text = text if len(text) <= fits else text[: fits - 3] + "..."
            figure.text(left / whole[0], (top - LINE) / whole[1], text, fontsize=7)
            for side, (images, word) in enumerate(((before, "before"), (after, "after"))):
                place = [left + side * (across + GAP / 2), top - LINE - 4 - down, across, down]
                axis = figure.add_axes([value / whole[j % 2] for j, value in enumerate(place)])
                # Small pictures as they are, pixel by pixel; larger ones smoothed.
                axis.imshow(images[k], interpolation="nearest" if width <= LEAST else "antialiased", aspect="auto")
                axis.set_xticks([])
                axis.set_yticks([])
                axis.set_xlabel(word, fontsize=6, labelpad=1)
                good = passed is not None and passed[side][k] > 0.5
                for spine in axis.spines.values():
                    spine.set_color("grey" if passed is None else "tab:green" if good else "tab:red")
                    spine.set_linewidth(2)
        figure.suptitle(shortened(title, 110), fontsize=9, y=1 - 2 / whole[1], va="top")
        save(figure, path, DOTS)


def curves(
    rewards: Mapping[str, Sequence[tuple[int, float]]],
    evaluations: Mapping[str, Points],
    path: Path,
    title: str,
    judged_on: str = "held-out evaluation, 95 % intervals",
) -> None:
    """Training rewards (update, mean) by name with a running mean, and evaluations with their intervals, over updates."""
    title = shortened(title, 110)
    with figures([title, *rewards, *evaluations]) as plt:
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
        for name, points in rewards.items():
            x, y = (np.array(column) for column in zip(*points, strict=True))
            (line,) = axes[0].plot(x, y, alpha=0.3, linewidth=0.8)
            width = min(10, len(y))
            if width > 1:
                smooth = np.convolve(y, np.ones(width) / width, "valid")
                axes[0].plot(
                    x[width - 1 :], smooth, color=line.get_color(), label=f"{shortened(name, 40)}, mean of {width}"
                )
        for name, judged in evaluations.items():
            x, y, low, high = (np.array(column) for column in zip(*judged, strict=True))
            axes[1].errorbar(
                x, y, yerr=[y - low, high - y], capsize=3, marker="o", markersize=3, label=shortened(name, 50)
            )
        for axis, what in zip(axes, ("training samples (noisy)", judged_on), strict=True):
            axis.set_xlabel("update")
            axis.set_title(what, fontsize=9)
            axis.grid(alpha=0.3)
            if axis.get_legend_handles_labels()[1]:
                axis.legend(fontsize=7)
        figure.suptitle(title, fontsize=9)
        figure.tight_layout()
        save(figure, path, 120)
