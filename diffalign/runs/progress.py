"""What a person sees while a run goes on: a bar with reward and ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from diffalign.evaluation.fixed import judged

LINES = 20  # lines a run prints where there is no terminal


class Reporter:
    """Says what happens, on standard error."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(file=sys.stderr, quiet=quiet, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task: Any = None
        self._seconds: list[float] = []
        self._rewards: list[float] = []

    def say(self, line: str) -> None:
        self.console.print(line, markup=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    @contextmanager
    def update(self, index: int, total: int) -> Iterator[dict[str, float]]:
        """One training update: the caller fills the yielded dict with its metrics."""
        metrics: dict[str, float] = {}
        started = time.perf_counter()
        yield metrics
        self._seconds.append(time.perf_counter() - started)
        self._rewards.append(metrics.get("reward/total", metrics.get("reward", float("nan"))))
        recent = [value for value in self._rewards[-10:] if value == value]
        reward = f"{sum(recent) / len(recent):.3f}" if recent else "-"
        if self.console.is_terminal:
            self._advance(index, total, reward)
        elif index == 0 or (index + 1) % max(1, total // LINES) == 0 or index + 1 == total:
            pace = sum(self._seconds[-20:]) / len(self._seconds[-20:])
            left = pace * (total - index - 1)
            phases = ", ".join(
                f"{key.removeprefix('seconds/')} {value:.2f}"
                for key, value in metrics.items()
                if key.startswith("seconds/") and key != "seconds/total"
            )
            self.say(f"update {index + 1}/{total}  reward {reward}  {pace:.2f} s/update ({phases})  {left:.0f} s left")

    def _advance(self, index: int, total: int, reward: str) -> None:
        if self._bar is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
            )
            clock = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
            self._bar = Progress(*columns, *clock, console=self.console)
            self._bar.start()
            self._task = self._bar.add_task("training", total=total, completed=index, note="")
        self._bar.update(self._task, completed=index + 1, note=f"reward {reward}")

    def evaluated(self, update: int, summary: dict[str, float]) -> None:
        """One line a reward, with intervals and, after the first, the paired gain."""
        for name in judged(summary):
            line = f"update {update}  {name} {summary[name]:.3f} [{summary[name + '_lo']:.3f}, {summary[name + '_hi']:.3f}]"
            if f"{name}_gain" in summary:
                gain, low, high = (summary[f"{name}_gain{end}"] for end in ("", "_lo", "_hi"))
                line += f"  gain {gain:+.3f} [{low:+.3f}, {high:+.3f}]"
            self.say(line)
