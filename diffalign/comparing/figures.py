"""Figures for papers: curves of every judge, and differences of pairs with their intervals; as PDF and PNG."""

from __future__ import annotations

from pathlib import Path

from diffalign.comparing.curves import curve
from diffalign.comparing.results import Results
from diffalign.report import drawing

ENDINGS, DOTS = (".pdf", ".png"), 150


def write(results: Results, place: Path) -> None:
    """Write `reward` and `pairs`, the latter where there are any."""
    labels = [method.label for method in results.methods]
    with drawing.figures([*labels, *results.judges]) as plt:
        figure, axes = plt.subplots(1, len(results.judges), figsize=(4.2 * len(results.judges), 3.2), squeeze=False)
        for axis, judge in zip(axes[0], results.judges, strict=True):
            for number, method in enumerate(results.methods):
                found = curve(method, judge, "rows") if method.found else None
                if found is None or not found.x:
                    continue
                colour = f"C{number % 10}"
                axis.plot(found.x, found.y, color=colour, marker=".", label=f"{method.label} ({found.seeds})")
                axis.fill_between(found.x, found.low, found.high, color=colour, alpha=0.15, linewidth=0)
            axis.set_title(judge, fontsize=9)
            axis.set_xlabel("network rows; lines: mean over seeds, bands: lowest to highest", fontsize=7)
            axis.grid(alpha=0.3)
        lines, labels = axes[0][0].get_legend_handles_labels()
        figure.tight_layout(rect=(0, 0.09, 1, 1))  # below the curves: among them it hides some
        if labels:
            figure.legend(lines, labels, loc="lower center", ncols=len(labels), fontsize=7, frameon=False)
        for ending in ENDINGS:
            drawing.save(figure, place / f"reward{ending}", DOTS)
    for ending in ENDINGS:  # of an earlier report, which may have had pairs
        (place / f"pairs{ending}").unlink(missing_ok=True)
    if any(not pair.reason for pair in results.pairs):
        _pairs(results, place)


def _pairs(results: Results, place: Path) -> None:
    judges = [judge for judge in results.judges if any(p.judge == judge and not p.reason for p in results.pairs)]
    most = max(sum(p.judge == judge for p in results.pairs) for judge in judges)
    names = [f"{pair.first} - {pair.second}" for pair in results.pairs]
    with drawing.figures([*names, *judges]) as plt:
        figure, axes = plt.subplots(
            len(judges), 1, figsize=(6, 0.9 * len(judges) + 0.4 * most * len(judges)), squeeze=False
        )
        for axis, judge in zip(axes[:, 0], judges, strict=True):
            pairs = [pair for pair in results.pairs if pair.judge == judge and not pair.reason][::-1]
            for row, pair in enumerate(pairs):
                shown = pair.prompts or pair.difference.value
                colour = "black" if pair.resolved else "grey"
                if (ends := shown.ends) is not None:
                    axis.plot(ends, [row, row], color=colour)
                axis.plot([shown.value], [row], "o", color=colour, markersize=4)
            axis.axvline(0, color="grey", linewidth=0.8, linestyle=":")
            axis.set_yticks(range(len(pairs)), [f"{pair.first} - {pair.second}" for pair in pairs], fontsize=8)
            axis.set_ylim(-0.6, len(pairs) - 0.4)
            axis.set_title(f"{judge}: difference, 95 % interval (black: resolved)", fontsize=8)
            axis.tick_params(axis="x", labelsize=7)
        figure.tight_layout()
        for ending in ENDINGS:
            drawing.save(figure, place / f"pairs{ending}", DOTS)
