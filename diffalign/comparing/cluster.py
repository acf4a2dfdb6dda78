"""Units as tasks of a Ray cluster, whose nodes share a file system: Ray decides where and when, and takes up again what lost its worker."""

from __future__ import annotations

import os
import platform
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.comparing.methods import Unit
from diffalign.comparing.running import LOG, PAUSE, Process, Work, in_use
from diffalign.errors import UserError, one_line, shown
from diffalign.runtime.extras import missing

RETRIES = 3  # of a unit whose worker died
SECONDS = 10  # that a cluster's head has to answer
LOST, GONE = -signal.SIGTERM, -9  # codes of what was told to end before it began, and of what Ray gave up


@dataclass(frozen=True)
class Share:
    """What of a cluster a unit is given."""

    cpus: int
    gpus: int


def share(device: str, nodes: Sequence[Mapping[str, float]], jobs: int | None = None) -> Share:
    """A unit's share by its config's `device`: a GPU where it asks for one, or would take one; of CPUs a GPU's share of its node, one
    without, or a `jobs`-th of those there are.

    nodes: of each what Ray says of its resources, such as {"CPU": 16.0, "GPU": 2.0}.

    Raises:
        UserError: if no node has what the device asks for, or it names one by its number.
    """
    if device.startswith("cuda:"):
        raise UserError(f"device: got {device}; allowed with --ray are auto, cuda and cpu: Ray gives each unit a card")
    gpus = int(device == "cuda" or (device == "auto" and any(node.get("GPU", 0) >= 1 for node in nodes)))
    fit = [node for node in nodes if node.get("CPU", 0) >= 1 and node.get("GPU", 0) >= gpus]
    if not fit:
        raise UserError(f"--ray: no node of the cluster has {'a GPU and ' * gpus}a CPU, and device: got {device}")
    most = int(max(node["CPU"] for node in fit))
    if jobs is not None:
        return Share(min(most, max(1, int(sum(node["CPU"] for node in fit)) // jobs)), gpus)
    if not gpus:
        return Share(1, 0)
    return Share(max(1, min(int(node["CPU"] // node["GPU"]) for node in fit)), gpus)


class Cluster:
    """A Ray cluster that this process is connected to."""

    begins = "given to Ray"

    def __init__(self, jobs: int | None) -> None:
        import ray

        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self.nodes, self.jobs = alive, jobs
        # A process for each unit: none meets what another left behind.
        self.train = ray.remote(max_retries=RETRIES, max_calls=1)(train)

    def check(self, units: Sequence[Unit]) -> None:
        """Refuse units that the cluster has no room for.

        Raises:
            UserError: with every mistake.
        """
        problems = []
        for unit in units:
            try:
                self._share(unit)
            except UserError as error:
                problems += [f"{unit.method.label}: {problem}" for problem in error.problems]
        if problems:
            raise UserError(*dict.fromkeys(problems))

    def _share(self, unit: Unit) -> Share:
        return share(unit.method.settings["device"], self.nodes, self.jobs)

    def begin(self, unit: Unit) -> Work:
        """Give a unit to Ray, which trains it when there is room."""
        own = self._share(unit)
        place = str(unit.place.absolute())
        task = self.train.options(num_cpus=own.cpus, num_gpus=own.gpus, name=unit.name)
        return Task(task.remote(unit.command(), place, own.cpus, os.getcwd()), Path(place) / LOG)

    @property
    def said(self) -> str:
        """What it is."""
        cpus, gpus = (int(sum(node.get(kind, 0) for node in self.nodes)) for kind in ("CPU", "GPU"))
        count = len(self.nodes)
        return f"a Ray cluster of {count} node{'s' * (count != 1)}, {cpus} CPUs, {gpus} GPUs"


def reached(address: str) -> None:
    """Refuse an address where nothing listens: Ray itself goes on trying for minutes.

    Raises:
        UserError: if it is neither `auto` nor HOST:PORT of something that answers.
    """
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--ray: got {shown(address)}, allowed are auto and HOST:PORT of a cluster's head")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS).close()
    except OSError as error:
        raise _unanswered(address, error) from error


def _unanswered(address: str, error: Exception) -> UserError:
    return UserError(
        f"--ray: got {shown(address)}, no cluster answers ({one_line(error)}); `ray start --head` begins one; allowed: auto, HOST:PORT"
    )


@contextmanager
def connected(address: str, jobs: int | None) -> Iterator[Cluster]:
    """A cluster at an address, `auto`: that of `RAY_ADDRESS`, or the one that runs on this machine.

    Raises:
        UserError: if Ray is not installed, or none is there.
    """
    if mend := missing("ray"):
        raise UserError(f"--ray: it needs ray, which is not installed: {mend}")
    reached(address)
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level="error", ignore_reinit_error=False)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise _unanswered(address, error) from error
    try:
        yield Cluster(jobs)
    finally:
        ray.shutdown()


@dataclass
class Task:
    """A unit that Ray has. told: how often it was told to end."""

    reference: Any
    log: Path
    began: float = field(default_factory=time.monotonic)
    told: int = 0
    took: float | None = None  # seconds, of the worker that ended it

    @property
    def seconds(self) -> float:
        """Since Ray was given it; once it has ended, what its last worker took."""
        return time.monotonic() - self.began if self.took is None else self.took

    def poll(self) -> int | None:
        import ray

        if not ray.wait([self.reference], timeout=0)[0]:
            return None
        try:
            code, self.took = ray.get(self.reference)
        except ray.exceptions.TaskCancelledError:
            return LOST
        except ray.exceptions.RayError as error:  # it was lost too often, or a worker cannot run it
            with self.log.open("a") as log:
                log.write(f"diffalign: Ray: {one_line(getattr(error, 'cause', None) or error)}\n")
            return LOST if self.told else GONE
        return code

    def tell(self, number: int) -> None:
        """Let it save and end; told again, it ends at once. The kind of signal does not reach the cluster."""
        import ray

        ray.cancel(self.reference, force=self.told > 0)
        self.told += 1


# -- on the worker


def train(arguments: list[str], place: str, threads: int, cwd: str) -> tuple[int, float]:
    """Train a unit in a process of this worker; its exit code, and the seconds that it took. Cancelled, it is told to save and end."""
    own, began = Path(place), time.monotonic()
    with (own / LOG).open("a") as log:
        log.write(f"diffalign: by Ray's worker {os.getpid()} on {platform.node()}\n")
    with _told() as stops:
        while in_use(own) and not stops():  # by what an earlier worker of it left on another node
            time.sleep(PAUSE)
        if stops():
            return LOST, 0.0
        command = [sys.executable, "-m", "diffalign", *arguments]
        process = Process.begun(command, own, threads, cwd if os.path.isdir(cwd) else None, _dying_with_us())
        told = 0
        while (code := process.poll()) is None:
            while told < stops():
                process.tell(signal.SIGTERM)  # Ray's workers block SIGINT, and so do their children
                told += 1
            time.sleep(PAUSE)
    return code, time.monotonic() - began


@contextmanager
def _told() -> Iterator[Callable[[], int]]:
    """How often Ray has cancelled the task: it raises KeyboardInterrupt through the handler of SIGINT."""
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        yield lambda: len(seen)
    finally:
        signal.signal(signal.SIGINT, before)


def _dying_with_us() -> Callable[[], None] | None:
    """What lets a process that is begun end with this one, however this ends; None where the system has no such thing: the next worker
    then waits for it."""
    if not sys.platform.startswith("linux"):
        return None
    import ctypes

    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def ask() -> None:
        prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it was gone before
            os._exit(1)

    return ask
