"""Training rewards of several runs in one picture: python benchmarks/curves.py OUT.png RUN...

Means over a window of updates, over the network rows a run has used: rows are what rules of different cost have in common.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import yaml

from diffalign.runs.folder import read_rows

WINDOW = 15


def main(picture: Path, runs: list[Path]) -> None:
    """One line a run; runs of one rule have one colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4))
    colours: dict[str, str] = {}
    for run in runs:
        config = yaml.safe_load((run / "config.yaml").read_text())
        name = config["rule"]["name"]
        rows = [row for row in read_rows(run) if "nfe" in row]
        reward = np.convolve([row["reward/total"] for row in rows], np.ones(WINDOW) / WINDOW, "valid")
        used = np.cumsum([row["nfe"] for row in rows])[WINDOW - 1 :] / 1000
        first = name not in colours
        colour = colours.setdefault(name, f"C{len(colours)}")
        axis.plot(used, reward, color=colour, label=name if first else None, linestyle="-" if first else "--")
    axis.set_xlabel("network rows used, thousands")
    axis.set_ylabel(f"training reward, mean of {WINDOW} updates")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(run) for run in sys.argv[2:]])
