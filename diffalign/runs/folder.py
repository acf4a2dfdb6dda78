"""A run's folder: opened, locked, and refused before torch is imported if it cannot be used."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from pathlib import Path
from typing import IO, Any

import yaml

from diffalign import config as configs
from diffalign.errors import Fault, UserError, one_line
from diffalign.runs.events import Evaluated, Listener, Updated
from diffalign.runtime.files import write_text
from diffalign.types import Prompts, Scores

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
SCORES = "scores.jsonl"
MAY_CHANGE = {"updates", "run_dir"}
OURS = (
    CONFIG,
    METRICS,
    SCORES,
    "checkpoints",
    "samples",
    "evaluation",
    "adapter",
    "best",
    "trackers",
    "curves.png",
    "before_after.png",
)


class RunFolder(Listener):
    """`config.yaml`, `metrics.jsonl`, `scores.jsonl`, `checkpoints/`, `samples/`, `evaluation/`, `adapter/`,
    `best/`, `curves.png`.

    Held by one process at a time; a second one is refused. The others of a run that has several read it, without a lock.
    """

    def __init__(self, path: Path, lock: IO[str] | None = None, fresh: bool = False) -> None:
        self.path, self._lock, self._fresh = path, lock, fresh

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def begin(self, config: configs.Config) -> None:
        """Write the resolved config; with `fresh`, delete the run that was here. Called once everything has loaded."""
        if self._fresh:
            _clear(self.path)
        write_text(self.path / CONFIG, configs.dump(config))

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def updated(self, event: Updated) -> None:
        """The update's metrics and, where it was scored, its scores."""
        if event.update.judged is not None:
            self.append_scores(event.number, *event.update.judged)
        self.append({"update": event.number, **event.row})

    def evaluated(self, event: Evaluated) -> None:
        self.append({"update": event.number, **event.summary.row()})

    def append(self, row: dict[str, Any]) -> None:
        """Add one object to `metrics.jsonl`; numbers that are not finite have no place in JSON and are left out."""
        row = {key: value for key, value in row.items() if not isinstance(value, float) or math.isfinite(value)}
        self._add(METRICS, row)

    def append_scores(self, update: int, prompts: Prompts, scores: Scores) -> None:
        """Add an update's raw scores to `scores.jsonl`, sample by sample, null where there is none."""
        by_name = {
            name: [float(value) if math.isfinite(value) else None for value in values]
            for name, values in scores.by_name.items()
        }
        self._add(SCORES, {"update": update, "prompt": prompts.text, "seed": prompts.seed.tolist(), "scores": by_name})

    def _add(self, name: str, row: dict[str, Any]) -> None:
        """One more line of a file, on the disk."""
        try:
            with (self.path / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise Fault(f"{self.path / name}: cannot write ({error.strerror or error})") from error

    def rows(self) -> list[dict[str, Any]]:
        """The objects of `metrics.jsonl`; a last line cut short by a kill is left out."""
        return read_rows(self.path)

    def rewind(self, update: int) -> None:
        """Drop rows, evaluations and samples of more than `update` updates: they will be made again."""
        for name in (METRICS, SCORES):
            kept = [row for row in read_rows(self.path, name) if row["update"] <= update]
            if name == METRICS or (self.path / name).is_file():
                write_text(self.path / name, "".join(json.dumps(row) + "\n" for row in kept))
        for path in (p for name in ("evaluation", "samples") for p in (self.path / name).glob("update_*")):
            if int(path.stem.removeprefix("update_")) > update:
                path.unlink()


def read_rows(folder: Path, name: str = METRICS) -> list[dict[str, Any]]:
    """The metrics of a run, or its scores, one object an update."""
    path = folder / name
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break  # killed while it was written; nothing after it can be trusted
        if not isinstance(row, dict) or not isinstance(row.get("update"), int):
            break
        rows.append(row)
    return rows


def open_run(config: configs.Config, fresh: bool) -> RunFolder:
    """Lock the run folder of a config and check that it can be used; nothing in it changes before `RunFolder.begin`.

    Raises:
        UserError: if it cannot be written, is in use, or holds a run with another config.
    """
    path = Path(config.run_dir)
    try:
        lock = _lock(path)
        try:
            if not fresh:
                _check_same(path, config)
            probe = path / ".write"
            probe.write_text("x", encoding="utf-8")
            probe.unlink()
        except BaseException:
            lock.close()
            raise
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"run_dir: got {str(path)!r}, cannot write there ({reason}); allowed is a folder you own"
        ) from error
    return RunFolder(path, lock, fresh)


def _lock(path: Path) -> IO[str]:
    path.mkdir(parents=True, exist_ok=True)
    lock = (path / ".lock").open("w", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise UserError(f"run_dir: {path} is in use by another process; choose another run_dir") from error
    return lock


def _clear(path: Path) -> None:
    """Delete what an earlier run wrote; other files stay, and a folder that holds no run stays as it is."""
    if not ((path / CONFIG).is_file() and (path / METRICS).is_file()):
        return
    for name in OURS:
        target = path / name
        shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)


def _check_same(path: Path, config: configs.Config) -> None:
    if not (path / CONFIG).is_file():
        return
    try:
        old = yaml.safe_load((path / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(old, dict):
            raise ValueError("it holds no keys and values")
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"run_dir: {path / CONFIG} is damaged ({one_line(error)}); --fresh starts over") from error
    changed = configs.differences(configs.completed(old), configs.completed(config.model_dump(mode="json")))
    fixed = [line for line in changed if line.split(":")[0] not in MAY_CHANGE]
    done = max((int(p.name.removeprefix("update_")) for p in (path / "checkpoints").glob("update_*")), default=0)
    if config.updates < done:
        raise UserError(f"updates: got {config.updates}, {path} has done {done}; allowed is {done} or more, or --fresh")
    if fixed:
        lines = [f"run_dir: {path} holds a run with other settings; choose another run_dir, or --fresh to start over"]
        raise UserError(*lines, *(f"  {line}" for line in fixed))
