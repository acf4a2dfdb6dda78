"""Units trained in processes of their own, some at a time: begun, watched, stopped and told."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, Protocol

import filelock
from rich.console import Console
from rich.live import Live
from rich.table import Table

from diffalign.comparing.methods import Unit
from diffalign.errors import Interrupted, UserError, shortened
from diffalign.runs.folder import LOCK
from diffalign.runs.stop import SIGNALS, listened
from diffalign.runtime import launcher

LOG = "log.txt"  # in a unit's folder: what its process said
PAUSE = 0.2  # seconds between looks at what runs
TOLD = {sign + 128 for sign in SIGNALS} | {-sign for sign in SIGNALS}  # codes of a run that was told to end


class Work(Protocol):
    """A unit that was begun somewhere."""

    @property
    def seconds(self) -> float:
        """How long it has been trained, this time."""

    def poll(self) -> int | None:
        """The exit code of what trains it, None while it runs."""

    def tell(self, number: int) -> None:
        """Pass a signal on to it."""


class Where(Protocol):
    """Something that trains units. begins: what is said of one that it was given."""

    begins: str

    def begin(self, unit: Unit) -> Work:
        """Train a unit, whose folder is there, without waiting for it."""


def command(unit: Unit) -> list[str]:
    """What trains a unit, with this interpreter."""
    return [sys.executable, "-m", "diffalign", *unit.command()]


@dataclass
class Process:
    """A process of this machine that trains a unit."""

    process: subprocess.Popen[bytes]
    log: BinaryIO
    began: float = field(default_factory=time.monotonic)

    @classmethod
    def begun(
        cls,
        arguments: list[str],
        place: Path,
        threads: int,
        cwd: str | None = None,
        first: Callable[[], None] | None = None,
    ) -> Process:
        """Begin one that writes into a unit's log; first: what it does before all else."""
        log = (place / LOG).open("ab")
        # A session of its own: Ctrl-C reaches this process alone, which passes it on once.
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=launcher.child(threads),
            start_new_session=True,
            cwd=cwd,
            preexec_fn=first,
        )
        return cls(process, log)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def poll(self) -> int | None:
        code = self.process.poll()
        if code is not None:
            self.log.close()
        return code

    def tell(self, number: int) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)


class Here:
    """This machine, whose CPUs are shared out among `jobs` units. command: what trains a unit, where it is not `diffalign train`."""

    begins = "begins"

    def __init__(self, jobs: int, command: Callable[[Unit], list[str]] = command) -> None:
        self.command, self.threads = command, max(1, launcher.cpus() // jobs)

    def begin(self, unit: Unit) -> Work:
        """Train a unit in a process with its share of the CPUs."""
        return Process.begun(self.command(unit), unit.place, self.threads)


@dataclass
class Running:
    """A unit that was begun, and how many signals it was sent."""

    unit: Unit
    work: Work
    told: int = 0


class Runner:
    """Trains units, `jobs` at a time; `say` hears when each begins, ends or fails. where: what trains them, None: this machine.

    On SIGINT, SIGTERM and SIGHUP nothing new is begun and what runs is told the same: it saves and ends. A second one ends it at once.
    """

    def __init__(self, jobs: int, say: Callable[[str], None], where: Where | None = None) -> None:
        self.jobs, self.say, self.console = jobs, say, Console(stderr=True)
        self.where = where or Here(jobs)
        self.running: list[Running] = []
        self.failed: dict[Unit, str] = {}  # with the last line each said
        self.codes: dict[Unit, int] = {}  # that those ended with
        self.stopped: int | None = None  # by which signal
        self.asked = 0  # how often

    def run(self, units: Iterable[Unit | None]) -> dict[Unit, str]:
        """Train units to their ends; returns those that failed with the last line each said.

        units: taken one by one, when there is room; None: there is none just now, ask again.

        Raises:
            Interrupted: on a signal, once every unit has saved and ended.
        """
        source: Iterator[Unit | None] | None = iter(units)
        waiting: list[Unit] = []  # in use by another process
        with (
            listened(self._note),
            Live(get_renderable=self._table, console=self.console) if self.console.is_terminal else nullcontext(),
        ):
            while source is not None or waiting or self.running:
                while len(self.running) < self.jobs and self.stopped is None:
                    if (free := next((unit for unit in waiting if not in_use(unit.place)), None)) is not None:
                        waiting.remove(free)
                        self._begin(free)
                        continue
                    found = next(source, self) if source is not None else None
                    if found is self:
                        source = None
                    if not isinstance(found, Unit):
                        break
                    waiting.append(found)
                    if in_use(found.place):
                        self.say(f"{found.name}: in use by another process, waiting for it")
                if self.stopped is not None and not self.running:
                    break
                if source is not None or waiting or self.running:
                    time.sleep(PAUSE)
                self._pass_on()
                for each in list(self.running):
                    if (code := each.work.poll()) is not None:
                        self._end(each, code)
        if self.stopped is not None:
            raise Interrupted(128 + self.stopped)
        return self.failed

    def _begin(self, unit: Unit) -> None:
        unit.place.mkdir(parents=True, exist_ok=True)
        self.running.append(Running(unit, self.where.begin(unit)))
        self.say(f"{unit.name}: {self.where.begins}, {unit.place / LOG}")

    def _end(self, each: Running, code: int) -> None:
        self.running.remove(each)
        unit = each.unit
        if code == 0:
            self.say(f"{unit.name}: done in {each.work.seconds:.0f} s")
        elif self.stopped is not None and code in TOLD:
            self.say(f"{unit.name}: stopped")
        else:
            self.failed[unit], self.codes[unit] = last_line(unit.place / LOG) or f"exit code {code}", code
            self.say(f"{unit.name}: failed with code {code}: {self.failed[unit]}")

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.stopped, self.asked = number, self.asked + 1

    def _pass_on(self) -> None:
        """Tell what runs, also what began while the signal came."""
        for each in self.running:
            while self.stopped is not None and each.told < self.asked:
                each.work.tell(self.stopped)
                each.told += 1

    def _table(self) -> Table:
        table: Any = Table("method", "seed", "seconds", "last line", box=None)
        for each in self.running:
            line = shortened(last_line(each.unit.place / LOG), 70)
            table.add_row(each.unit.method.label, str(each.unit.seed), f"{each.work.seconds:.0f}", line)
        return table


def last_line(path: Path) -> str:
    """The last line of a log that is not empty; empty if there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""


@contextmanager
def held(place: Path) -> Iterator[None]:
    """Keep other processes from training units in a folder.

    Raises:
        UserError: if one does.
    """
    lock = filelock.FileLock(place.absolute() / LOCK, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise UserError(f"--out: {place} is in use by another process; wait until it has ended") from error
    try:
        yield
    finally:
        lock.release()


def in_use(place: Path) -> bool:
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
