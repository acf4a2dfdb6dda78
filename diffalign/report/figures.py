"""Figures of a run: the same samples before and after, and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.report.pictures import Pixels

Points = list[tuple[float, float, float, float]]  # update, value, low, high


def before_after(
    before: Pixels, after: Pixels, captions: Sequence[str], passed: tuple[Any, Any] | None, path: Path, title: str
) -> None:
    """The same prompts and seeds before and after training, side by side; a frame is green where the gold reward passes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shape = before.shape[1] / before.shape[2]
    pairs_per_row = 4 if shape > 0.5 else 2  # strips of a video's frames are wide
    rows = -(-len(captions) // pairs_per_row)
    size = (10, rows * (5 / pairs_per_row * shape + 0.25 + 0.15 * (shape < 0.5)) + 0.5)
    figure, axes = plt.subplots(rows, 2 * pairs_per_row, figsize=size, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for k, caption in enumerate(captions):
        for side, (images, word) in enumerate(((before, "before"), (after, "after"))):
            axis = axes[k // pairs_per_row, 2 * (k % pairs_per_row) + side]
            axis.axis("on")
            axis.imshow(images[k], interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_xlabel(word, fontsize=6, labelpad=1)
            for spine in axis.spines.values():
                good = passed is not None and passed[side][k] > 0.5
                spine.set_color("grey" if passed is None else "tab:green" if good else "tab:red")
                spine.set_linewidth(2)
            if side == 0:
                axis.set_title(caption.removeprefix("a photo of "), fontsize=7, loc="left", pad=2)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout(pad=0.4, rect=(0, 0, 1, 1 - 0.1 / rows))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def curves(
    rewards: Mapping[str, Sequence[tuple[int, float]]], evaluations: Mapping[str, Points], path: Path, title: str
) -> None:
    """Training rewards (update, mean) by name with a running mean, and evaluations with their intervals, over updates."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for name, points in rewards.items():
        x, y = (np.array(column) for column in zip(*points, strict=True))
        (line,) = axes[0].plot(x, y, alpha=0.3, linewidth=0.8)
        width = min(10, len(y))
        if width > 1:
            smooth = np.convolve(y, np.ones(width) / width, "valid")
            axes[0].plot(x[width - 1 :], smooth, color=line.get_color(), label=f"{name}, mean of {width}")
    for name, judged in evaluations.items():
        x, y, low, high = (np.array(column) for column in zip(*judged, strict=True))
        axes[1].errorbar(x, y, yerr=[y - low, high - y], capsize=3, marker="o", markersize=3, label=name)
    for axis, what in zip(axes, ("training samples (noisy)", "held-out evaluation, 95 % intervals"), strict=True):
        axis.set_xlabel("update")
        axis.set_title(what, fontsize=9)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
