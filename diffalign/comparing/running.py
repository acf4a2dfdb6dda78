"""Units trained in processes of their own, some at a time: begun, watched, stopped and told."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

import filelock
from rich.console import Console
from rich.live import Live
from rich.table import Table

from diffalign.comparing.comparison import Unit
from diffalign.errors import Interrupted, shortened
from diffalign.runs.folder import LOCK
from diffalign.runs.stop import SIGNALS, listened
from diffalign.runtime import launcher

LOG = "log.txt"  # in a unit's folder: what its process said
PAUSE = 0.2  # seconds between looks at what runs


@dataclass
class Running:
    """A unit's process."""

    unit: Unit
    process: subprocess.Popen[bytes]
    log: BinaryIO
    began: float = field(default_factory=time.monotonic)
    told: int = 0  # how many signals it was sent

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.began


class Runner:
    """Trains units, `jobs` at a time; `say` hears when each begins, ends or fails.

    command: what trains a unit, where it is not `diffalign train`.

    On SIGINT, SIGTERM and SIGHUP nothing new is begun and what runs is told the same: it saves and ends. A second one ends it at once.
    """

    def __init__(
        self, jobs: int, say: Callable[[str], None], command: Callable[[Unit], list[str]] | None = None
    ) -> None:
        self.jobs, self.say, self.console = jobs, say, Console(stderr=True)
        self.command = command or (lambda unit: [sys.executable, "-m", "diffalign", *unit.command()])
        self.threads = max(1, (os.cpu_count() or 1) // jobs)
        self.running: list[Running] = []
        self.failed: dict[Unit, str] = {}
        self.stopped: int | None = None  # by which signal
        self.asked = 0  # how often

    def run(self, units: Sequence[Unit]) -> dict[Unit, str]:
        """Train units to their ends; returns those that failed with the last line each said.

        Raises:
            Interrupted: on a signal, once every unit has saved and ended.
        """
        waiting, told = list(units), set[Path]()
        with (
            listened(self._note),
            Live(get_renderable=self._table, console=self.console) if self._shown else nullcontext(),
        ):
            while waiting or self.running:
                while waiting and len(self.running) < self.jobs and self.stopped is None:
                    free = next((unit for unit in waiting if not _in_use(unit.place)), None)
                    if free is None:
                        self._tell_used(waiting, told)
                        break
                    waiting.remove(free)
                    self._begin(free)
                if self.stopped is not None and not self.running:
                    break
                time.sleep(PAUSE)
                self._pass_on()
                for each in [each for each in self.running if each.process.poll() is not None]:
                    self._end(each)
        if self.stopped is not None:
            raise Interrupted(128 + self.stopped)
        return self.failed

    @property
    def _shown(self) -> bool:
        return self.console.is_terminal

    def _tell_used(self, waiting: Sequence[Unit], told: set[Path]) -> None:
        for unit in waiting:
            if unit.place not in told:
                told.add(unit.place)
                self.say(f"{unit.name}: in use by another process, waiting for it")

    def _begin(self, unit: Unit) -> None:
        unit.place.mkdir(parents=True, exist_ok=True)
        log = (unit.place / LOG).open("ab")
        # A session of its own: Ctrl-C reaches this process alone, which passes it on once.
        process = subprocess.Popen(
            self.command(unit),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=launcher.child(self.threads),
            start_new_session=True,
        )
        self.running.append(Running(unit, process, log))
        self.say(f"{unit.name}: begins, {unit.place / LOG}")

    def _end(self, each: Running) -> None:
        self.running.remove(each)
        each.log.close()
        code, unit = each.process.returncode, each.unit
        if code == 0:
            self.say(f"{unit.name}: done in {each.seconds:.0f} s")
        elif self.stopped is not None and code in {sign + 128 for sign in SIGNALS} | {-sign for sign in SIGNALS}:
            self.say(f"{unit.name}: stopped")
        else:
            self.failed[unit] = last_line(unit.place / LOG) or f"exit code {code}"
            self.say(f"{unit.name}: failed with code {code}: {self.failed[unit]}")

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.stopped, self.asked = number, self.asked + 1

    def _pass_on(self) -> None:
        """Tell what runs, also what began while the signal came."""
        for each in self.running:
            while self.stopped is not None and each.told < self.asked and each.process.poll() is None:
                each.process.send_signal(self.stopped)
                each.told += 1

    def _table(self) -> Table:
        table: Any = Table("method", "seed", "seconds", "last line", box=None)
        for each in self.running:
            line = shortened(last_line(each.unit.place / LOG), 70)
            table.add_row(each.unit.method.label, str(each.unit.seed), f"{each.seconds:.0f}", line)
        return table


def last_line(path: Path) -> str:
    """The last line of a log that is not empty; empty if there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _in_use(place: Path) -> bool:
    """Whether a process works in a run folder, such as one that was started by a comparison that was killed since."""
    if not (place / LOCK).is_file():
        return False
    lock = filelock.FileLock(place / LOCK, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        return True
    lock.release()
    return False
