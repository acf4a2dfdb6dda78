"""A run's folder: opened, locked, and refused before torch is imported if it cannot be used."""

from __future__ import annotations

import shutil
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import filelock

from diffalign import config as configs
from diffalign.errors import UserError, one_line
from diffalign.models.notes import LORA
from diffalign.runs.budget import Budget, Spent
from diffalign.runs.events import Drawn, Evaluated, Listener, Updated
from diffalign.runs.logs import METRICS, SCORES, Logs, read_rows
from diffalign.runs.resume import WAY_OUT, Taken, take_up
from diffalign.runs.store import Store
from diffalign.runtime import keys, numbered
from diffalign.runtime.files import write_text
from diffalign.runtime.yaml_text import parse

CONFIG, LOCK = "config.yaml", ".lock"
PAGE = "index.html"
SECTIONS = frozenset({"lora", "optimizer", "evaluation", "output"})  # which the config of every run names
FILES = (CONFIG, METRICS, SCORES, PAGE, "curves.png", "before_after.png", "errors.log")
# folder -> endings of the files in it that carry an update's number
NUMBERED = {"evaluation": (".json",), "samples": (".png", ".npz")}
FOLDERS = ("adapter", "best", "trackers")


class RunFolder(Listener):
    """What a run writes, in one folder: docs/run-folder.md names it all. Whatever else is there is the user's and stays.

    Held by one process at a time; a second one is refused. The others of a run that has several read it, without a lock.
    """

    def __init__(self, path: Path, lock: Lock | None = None, fresh: bool = False) -> None:
        self.path, self._lock, self._fresh = path.absolute(), lock, fresh
        self.taken = Taken()
        self.store, self.logs = Store(self.path / "checkpoints"), Logs(self.path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def newest(self) -> Path | None:
        """The checkpoint to go on from; none with `fresh`."""
        newest = None if self._fresh else self.store.newest()
        for path in self.store.damaged:
            self.logs.say(f"{path} is damaged and passed over")
        return newest

    def begin(self, config: configs.Config) -> None:
        """Write the resolved config; with `fresh`, delete the run that was here. Called once everything has loaded."""
        if self._fresh:
            self._clear()
        self._tidy()
        write_text(self.path / CONFIG, configs.dump(config))

    def keep_error(self, error: BaseException) -> None:
        """Add an error and what led to it to `errors.log`, where there is more to it than its line."""
        if error.__cause__ is None or not self.path.is_dir():
            return
        text = "".join(traceback.format_exception(error))
        with (
            suppress(OSError),
            (self.path / "errors.log").open("a", encoding="utf-8", errors="backslashreplace") as file,
        ):
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n{text}\n")

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def updated(self, event: Updated) -> None:
        """The update's metrics and, where it was scored, its scores."""
        if event.update.judged is not None:
            self.logs.append_scores(event.number, *event.update.judged)
        self.logs.append({"update": event.number, **event.row})

    def evaluated(self, event: Evaluated) -> None:
        self.logs.append({"update": event.number, **event.summary.row(), **event.spent.row()})

    def drawn(self, event: Drawn) -> None:
        if event.drift is not None:
            self.logs.append({"update": event.number, keys.DRIFT: event.drift})

    def rewind(self, update: int, signed: dict[str, str]) -> None:
        """Drop rows, evaluations and samples of more than `update` updates: they will be made again; so will an evaluation that a kill
        kept out of the log.
        """
        self.logs.rewind(update, signed)
        logged = self.logs.evaluated(update)
        for path, number in self._numbered():
            if number > update or (path.parent.name == "evaluation" and number == update and not logged):
                path.unlink()

    def _numbered(self) -> list[tuple[Path, int]]:
        return [
            (path, number)
            for name, endings in NUMBERED.items()
            for ending in endings
            for number, path in numbered.files(self.path / name, ending).items()
        ]

    def _tidy(self) -> None:
        """Delete what a kill left half written."""
        self.store.tidy()
        for path in (self.path / name for name in FILES):
            path.with_name(f"{path.name}.part").unlink(missing_ok=True)
        for name, endings in NUMBERED.items():
            for ending in endings:
                for path in numbered.files(self.path / name, f"{ending}.part").values():
                    path.unlink()
        for name in FOLDERS:
            shutil.rmtree(self.path / f".{name}.part", ignore_errors=True)

    def _clear(self) -> None:
        """Delete what an earlier run wrote, its checkpoints first, so that no moment leaves them beside other settings; a folder that
        holds no run stays as it is."""
        if not (self.store.folder.is_dir() or ((self.path / CONFIG).is_file() and (self.path / METRICS).is_file())):
            return
        self.store.clear()
        for path, _ in self._numbered():
            path.unlink()
        for path in (self.path / name for name in FOLDERS):
            path.unlink() if path.is_symlink() else shutil.rmtree(path, ignore_errors=True)
        for path in (self.path / name for name in FILES):
            path.unlink(missing_ok=True)
        for name in ("checkpoints", *NUMBERED):
            folder = self.path / name
            if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
                folder.rmdir()


class Lock:
    """A run folder, made where it is not there, held by this process.

    Raises:
        UserError: if another process holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._made = [place for place in (self.path, *self.path.parents) if not place.exists()]
        path.mkdir(parents=True, exist_ok=True)
        self._lock = filelock.FileLock(self.path / LOCK, timeout=0, thread_local=False)
        try:
            self._lock.acquire()
        except filelock.Timeout as error:
            raise UserError(f"run_dir: {path} is in use by another process; choose another run_dir") from error

    def release(self) -> None:
        """Let another process in; folders that were made for a run in which nothing was written go away."""
        unused = self.path.is_dir() and [file.name for file in self.path.iterdir()] == [LOCK]
        if unused:
            (self.path / LOCK).unlink()
        self._lock.release()
        with suppress(OSError):  # another process has begun in it
            for place in self._made if unused else ():
                place.rmdir()


def open_run(config: configs.Config, fresh: bool = False, change: bool = False) -> RunFolder:
    """Lock the run folder of a config and check that it can be used; nothing in it changes before `RunFolder.begin`.

    fresh: delete what is there and start over; change: accept settings that a run may change on request.

    Raises:
        UserError: if it cannot be written, is in use, or holds a run that may not go on with this config.
    """
    path = Path(config.run_dir)
    try:
        lock = Lock(path)
        try:
            _check_kinds(path)
            folder = RunFolder(path, lock, fresh)
            if not fresh:
                folder.taken = _taken(path, folder.store, config, change)
            probe = path / ".write"
            probe.write_text("x", encoding="utf-8")
            probe.unlink()
        except BaseException:
            lock.release()
            raise
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"run_dir: got {str(path)!r}, cannot write there ({reason}); allowed is a folder you own"
        ) from error
    return folder


def _check_kinds(path: Path) -> None:
    """Refuse a folder in which a file stands where the run writes a folder, or the other way round."""
    for name in ("checkpoints", *NUMBERED, *FOLDERS):
        if (path / name).exists() and not (path / name).is_dir():
            raise UserError(
                f"run_dir: {path / name} is a file, a run has a folder there; move it, or choose another run_dir"
            )
    for name in FILES:
        if (path / name).is_dir():
            raise UserError(
                f"run_dir: {path / name} is a folder, a run has a file there; move it, or choose another run_dir"
            )


def _check_others(path: Path) -> None:
    """Refuse to begin a run where its files would take the place of somebody's: no run is there that could have written them."""
    theirs = [name for name in FILES if (path / name).is_file()]
    theirs += [
        f"{name}/{file}"
        for name in ("adapter", "best")
        for file in ("README.md", LORA)
        if (path / name / file).is_file()
    ]
    if theirs:
        raise UserError(
            f"run_dir: {path} holds {', '.join(theirs)} and no run; choose another run_dir, or --fresh, which writes over them"
        )


def _taken(path: Path, store: Store, config: configs.Config, change: bool) -> Taken:
    """The run that a folder holds, taken up with a config; the config as it is where it holds none."""
    newest = store.newest()
    facts: dict[str, Any] = {} if newest is None else store.facts(newest)
    old = facts.get("settings") or _written(path)
    if newest is None:
        _check_lost(path, old)
    if newest is None and old is None:
        _check_others(path)
    if newest is not None:
        Budget.of(config).check_spent(path, Spent(**facts["spent"]))
    if old is None:
        return Taken()
    # An earlier version wrote all settings down and not which of them were named: those that are not now, stay as they are.
    return take_up(str(path), old, facts.get("given", ()), config, change)


def _written(path: Path) -> dict[str, Any] | None:
    """The settings that `config.yaml` holds, None where there is none, or where it is no run's: these name every section.

    Raises:
        UserError: if it is damaged: without a checkpoint nothing else says what the folder's run was.
    """
    if not (path / CONFIG).is_file():
        return None
    try:
        old = parse((path / CONFIG).read_text(encoding="utf-8"), CONFIG)
        if not isinstance(old, dict):
            raise ValueError("it holds no keys and values")
    except (ValueError, UserError) as error:
        raise UserError(f"run_dir: {path / CONFIG} is damaged ({one_line(error)}); --fresh starts over") from error
    return old if old.keys() >= SECTIONS else None


def _check_lost(path: Path, old: dict[str, Any] | None) -> None:
    """Refuse to start over, unasked, where a run has lost its checkpoints."""
    output = (old or {}).get("output")
    every = output.get("checkpoint_every") if isinstance(output, dict) else None
    done = max((row["update"] for row in read_rows(path)), default=0)
    if isinstance(every, int) and done > every:  # one was there when the update after it was logged
        raise UserError(f"run_dir: {path} holds {done} updates of a run and none of its checkpoints; {WAY_OUT}")
