"""What a person sees while a run goes on: a bar with reward and ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from diffalign.runs.events import Ended, Evaluated, Listener, Updated
from diffalign.runtime import keys

LINES = 20  # lines a run prints where there is no terminal


class Reporter(Listener):
    """Says what happens, on standard error."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(file=sys.stderr, quiet=quiet, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task: Any = None
        self.place: Any = ""  # the run's folder, for the last line
        self._seconds: list[float] = []
        self._rewards: list[float] = []

    def say(self, line: str) -> None:
        self.console.print(line, markup=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def updated(self, event: Updated) -> None:
        """The bar moves, or now and then there is a line."""
        row, total = event.row, event.total
        self._seconds.append(row["seconds/total"])
        self._rewards.append(row.get(keys.TOTAL, float("nan")))
        recent = [value for value in self._rewards[-10:] if value == value]
        reward = f"{sum(recent) / len(recent):.3f}" if recent else "-"
        if self.console.is_terminal:
            self._advance(event.number, total, reward)
        elif len(self._seconds) == 1 or event.number % max(1, total // LINES) == 0 or event.number == total:
            pace = sum(self._seconds[-20:]) / len(self._seconds[-20:])
            left = pace * (total - event.number)
            phases = ", ".join(
                f"{key.removeprefix('seconds/')} {value:.2f}"
                for key, value in row.items()
                if key.startswith("seconds/") and key != "seconds/total"
            )
            self.say(
                f"update {event.number}/{total}  reward {reward}  {pace:.2f} s/update ({phases})  {left:.0f} s of training left"
            )
        self._remark(event)

    def _remark(self, event: Updated) -> None:
        """What a user should know of an update."""
        update = event.update
        if update.unscored:
            self.say(f"update {event.number}: {update.unscored} samples have no score and carry no weight")
        if update.flat:
            self.say(f"update {event.number}: every group has equal rewards, nothing to learn; skipped")
        if update.nonfinite:
            so_far = int(event.row["skipped"])
            self.say(f"update {event.number}: the gradient is not finite; skipped ({so_far} so far)")

    def _advance(self, number: int, total: int, reward: str) -> None:
        if self._bar is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
            )
            clock = (TimeElapsedColumn(), TextColumn("elapsed,"), TimeRemainingColumn(), TextColumn("of training left"))
            self._bar = Progress(*columns, *clock, console=self.console)
            self._bar.start()
            self._task = self._bar.add_task("training", total=total, completed=number - 1, note="")
        self._bar.update(self._task, completed=number, note=f"reward {reward}")

    def evaluated(self, event: Evaluated) -> None:
        """One line a reward, with intervals and, after the first, the paired gain."""
        for name, judged in event.summary.rewards.items():
            line = f"update {event.number}  {keys.evaluated(name)} {judged.value.text()}"
            if judged.gain is not None:
                line += f"  gain {judged.gain.text('+.3f')}"
            self.say(line)

    def ended(self, event: Ended) -> None:
        self.say(f"done: {event.number} updates, {event.seconds:.0f} s, {self.place}")
