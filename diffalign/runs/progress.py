"""What a person sees while a run goes on: bars with reward and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from diffalign.runs.events import Ended, Evaluated, Listener, Updated
from diffalign.runtime import keys
from diffalign.runtime.words import duration

LINES = 20  # lines that updates print where there is no terminal
SOON, LATER = (
    2.0,
    30.0,
)  # seconds without a line after which one says what is being done: the first time, and from then on


class _Count(MofNCompleteColumn):
    """How many of how many, where that is known."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.total else Text("")


class _Left(ProgressColumn):
    """Seconds an update and how long updates will take, in units that read well."""

    def render(self, task: Task) -> Text:
        return Text(task.fields.get("left", ""))


class Pace:
    """How long updates take, by the last of them."""

    def __init__(self, recent: int = 20) -> None:
        self.recent = recent
        self.seconds: list[float] = []

    def told(self, left: int) -> str:
        """Seconds an update, and what so many more take."""
        last = self.seconds[-self.recent :]
        pace = sum(last) / len(last)
        return f"{duration(pace) if pace >= 10 else f'{pace:.2f} s'}/update, {duration(pace * left)} left"


class Reporter(Listener):
    """Says what happens, on standard error; never silent for long."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(file=sys.stderr, quiet=quiet, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._training: Any = None
        self._phase: Any = None
        self.place: Any = ""  # the run's folder, for the last line
        self._pace, self._rewards, self._lines = Pace(), list[float](), 0
        self._pulse = Pulse(self._said) if not (quiet or self.console.is_terminal) else None

    def say(self, line: str) -> None:
        self.console.print(line, markup=False)
        if self._pulse is not None:
            self._pulse.heard()

    def _said(self, line: str) -> None:
        self.console.print(line, markup=False)

    def close(self) -> None:
        if self._pulse is not None:
            self._pulse.stop()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    # -- what is being done

    def doing(self, what: str, done: int = 0, of: int = 0) -> None:
        """Something begins, or is so far: `done` of `of` parts, 0 of 0 where that is not known."""
        if self._pulse is not None:
            self._pulse.doing(what, done, of)
        elif self.console.is_terminal and not self.console.quiet:
            bar = self._bars()
            task = bar.tasks[bar.task_ids.index(self._phase)]
            if task.description != what:
                bar.reset(self._phase, total=of or None, description=what)
            bar.update(self._phase, completed=done, total=of or None, description=what)

    def begin(self, done: int, total: int) -> None:
        """An update begins."""
        if self._pulse is not None:
            self._pulse.place, self._pulse.patience = f"update {done + 1}/{total}: ", SOON if not self._lines else LATER
        elif self.console.is_terminal and not self.console.quiet:
            self._bars().update(self._training, completed=done, total=total, visible=True)

    def _bars(self) -> Progress:
        if self._bar is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                _Count(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = Progress(*columns, TimeElapsedColumn(), _Left(), console=self.console, transient=True)
            self._training = self._bar.add_task("updates", total=None, note="", visible=False)
            self._phase = self._bar.add_task("", total=None, note="")
            self._bar.start()
        return self._bar

    # -- what has happened

    def updated(self, event: Updated) -> None:
        """The bar moves, or now and then there is a line."""
        row, total = event.row, event.total
        self._pace.seconds.append(row["seconds/total"])
        self._rewards.append(row.get(keys.TOTAL, float("nan")))
        recent = [value for value in self._rewards[-10:] if value == value]
        reward = f"{sum(recent) / len(recent):.3f}" if recent else "-"
        left = self._pace.told(total - event.number)
        if self.console.is_terminal and not self.console.quiet:
            note = f"reward {reward}"
            self._bars().update(self._training, completed=event.number, total=total, note=note, left=left)
        elif not self._lines or event.number % max(1, total // LINES) == 0 or event.number == total:
            self._lines += 1
            phases = ", ".join(
                f"{key.removeprefix('seconds/')} {value:.2f}"
                for key, value in row.items()
                if key.startswith("seconds/") and key != "seconds/total"
            )
            self.say(f"update {event.number}/{total}  reward {reward}  {left} ({phases})")
        if self._pulse is not None:
            self._pulse.place, self._pulse.patience = "", SOON
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

    def evaluated(self, event: Evaluated) -> None:
        """One line a reward, with intervals and, after the first, the paired gain."""
        for name, judged in event.summary.rewards.items():
            line = f"update {event.number}  {keys.evaluated(name)} {judged.value.text()}"
            if judged.gain is not None:
                line += f"  gain {judged.gain.text('+.3f')}"
            self.say(line)

    def ended(self, event: Ended) -> None:
        for name, judged in event.summary.rewards.items():
            if judged.gain is not None and judged.gain.value < 0:
                sure = judged.gain.high is not None and judged.gain.high < 0
                how = "and its interval is below 0" if sure else "though its interval reaches above 0"
                self.say(
                    f"{name} is lower than before training, {how}: look at curves.png and samples/ before using it"
                )
        self.say(f"done: {event.number} updates, {duration(event.seconds)}, {self.place}")


class Pulse:
    """Says what is being done when nothing was said for some seconds, where no bar does. `say` is called from a thread of its own."""

    def __init__(self, say: Any, soon: float = SOON, later: float = LATER) -> None:
        self.say, self.soon, self.later = say, soon, later
        self.place, self.patience = "", soon
        self._what, self._done, self._of = "", 0, 0
        self._since = self._last = time.monotonic()
        self._told = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
        self._thread.start()

    def doing(self, what: str, done: int, of: int) -> None:
        if what != self._what:
            self._since, self._told = time.monotonic(), False
        self._what, self._done, self._of = what, done, of

    def heard(self) -> None:
        """Something was said."""
        self._last = time.monotonic()

    def stop(self) -> None:
        self._end.set()

    def _beat(self) -> None:
        while not self._end.wait(self.soon / 8):
            now = time.monotonic()
            patience = self.later if self._told else min(self.patience, self.later)
            if self._what and now - max(self._last, self._since) >= patience:
                of = f" {self._done}/{self._of}" if self._of else ""
                self.say(f"{self.place}{self._what}{of}, {duration(now - self._since)}")
                self._told = True
                self.heard()
