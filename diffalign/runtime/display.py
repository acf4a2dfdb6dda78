"""What a person sees while something goes on, on standard error: bars on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from diffalign.runtime.words import duration

SOON, LATER = (
    2.0,
    30.0,
)  # seconds without a line after which one says what is being done: the first time, and from then on


class _Count(MofNCompleteColumn):
    """How many of how many, where that is known."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.total else Text("")


class _Left(ProgressColumn):
    """What a task says of the time that is left."""

    def render(self, task: Task) -> Text:
        return Text(task.fields.get("left", ""))


class Display:
    """Says what is being done and what is to be known; never silent for long. quiet: it is."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(file=sys.stderr, quiet=quiet, highlight=False, soft_wrap=True)
        self.draws = self.console.is_terminal and not quiet
        self._bar: Progress | None = None
        self._phase: Any = None
        self._pulse = None if quiet or self.draws else Pulse(self._later)

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def say(self, line: str) -> None:
        self._print(line)
        if self._pulse is not None:
            self._pulse.heard()

    def result(self, line: str) -> None:
        """A line on standard output; bars make room for it."""
        self._hide()
        click.echo(line)
        if self._pulse is not None:
            self._pulse.heard()

    def _later(self, line: str) -> None:
        """From the pulse's thread, which may outlive what it writes to."""
        if not self.console.file.closed:
            self._print(line)

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False)

    def close(self) -> None:
        if self._pulse is not None:
            self._pulse.stop()
        self._hide()

    def _hide(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def doing(self, what: str, done: int = 0, of: int = 0) -> None:
        """Something begins, or is so far: `done` of `of` parts, 0 of 0 where that is not known."""
        if self._pulse is not None:
            self._pulse.doing(what, done, of)
        elif self.draws:
            bar = self.bars()
            if next(task for task in bar.tasks if task.id == self._phase).description != what:
                bar.reset(self._phase, total=of or None, description=what)
            bar.update(self._phase, completed=done, total=of or None, description=what)

    def bars(self) -> Progress:
        """What is drawn; the last line is what is being done."""
        if self._bar is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                _Count(),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                _Left(),
            )
            self._bar = Progress(*columns, console=self.console, transient=True, redirect_stdout=False)
            self.add_tasks(self._bar)
            self._phase = self._bar.add_task("", total=None, note="")
            self._bar.start()
        return self._bar

    def add_tasks(self, bar: Progress) -> None:
        """What stands above that line."""


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
