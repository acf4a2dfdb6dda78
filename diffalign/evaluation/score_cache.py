"""Scores that were given before, for evaluations: never for training, never failures."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import json
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffalign.errors import Fault, one_line
from diffalign.rewards.catalog import Entry

OURS = ("reward_models", "diffalign.ops", "diffalign.rewards", "diffalign.shapes")  # what rewards that ship are made of


def version(entry: Entry, files: Sequence[Path] = ()) -> str | None:
    """What a reward's scores depend on besides the sample: its code, the files that it was seen to read, and its weights; None if that
    cannot be known."""
    place = entry.place or entry.weights
    if entry.urls or place.startswith(("http://", "https://")):
        return None  # whatever runs behind an address may change
    if entry.source.endswith(".py"):  # with what stands beside it, which it may import
        code = _digest(sorted({*Path(entry.source).parent.glob("*.py"), *files}))
    elif entry.source.startswith("reward_models."):
        code = _shipped()
    else:
        spec = importlib.util.find_spec(entry.source)
        if spec is None or spec.origin is None:
            return None
        code = _digest([Path(spec.origin)])
    for local in map(Path, entry.places):  # a file may be replaced under its name
        files = [local] if local.is_file() else sorted(p for p in local.rglob("*") if p.is_file())
        place += "".join(f"|{p} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files)
    return f"{entry.attribute} {code} {place}"


@functools.cache
def _shipped() -> str:
    folders = [Path(p) for name in OURS for p in importlib.import_module(name).__path__]
    return _digest(sorted(path for folder in folders for path in folder.rglob("*.py")))


def _digest(files: list[Path]) -> str:
    hashed = hashlib.sha256()
    for path in files:
        hashed.update(path.read_bytes())
    return hashed.hexdigest()


def key(frames: NDArray[np.uint8], metadata: dict[str, Any], name: str, version: str, fps: float | None = None) -> str:
    """Name of a sample's score: its pixels (F, H, W, 3), its prompt and metadata, the reward and its version, frames per second where they
    are known."""
    facts = [frames.shape, metadata, name, version, *([] if fps is None else [float(fps)])]
    hashed = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    hashed.update(np.ascontiguousarray(frames).data)
    return hashed.hexdigest()


def _sum(key: str, score: float) -> str:
    return hashlib.sha256(f"{key} {score!r}".encode()).hexdigest()


class ScoreCache:
    """A SQLite file of scores by key; several processes may use it at once."""

    def __init__(self, path: Path) -> None:
        """Raises Fault if the file cannot be used."""
        self._path = path
        self._file = sqlite3.connect(path, timeout=60, isolation_level=None)
        try:
            # No write-ahead log: to switch to it does not wait for other processes.
            self._file.execute("CREATE TABLE IF NOT EXISTS files (name TEXT, path TEXT, PRIMARY KEY (name, path))")
            self._file.execute(
                "CREATE TABLE IF NOT EXISTS signed (key TEXT PRIMARY KEY, score REAL NOT NULL, sum TEXT NOT NULL)"
            )
        except sqlite3.OperationalError as error:
            self._file.close()
            raise Fault(f"{path}: cannot be used ({one_line(error)})") from error
        except sqlite3.DatabaseError as error:
            self._file.close()
            raise Fault(f"{path}: damaged ({one_line(error)}); delete it, scores are then asked for again") from error

    def read(self, keys: list[str]) -> list[float | None]:
        """Scores by key, None where there is none."""
        scores = []
        for name in keys:
            try:
                row = self._file.execute("SELECT score, sum FROM signed WHERE key = ?", (name,)).fetchone()
            except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
                raise Fault(
                    f"{self._path}: damaged ({one_line(error)}); delete it, scores are then asked for again"
                ) from error
            # A score that is not what was written is asked for again.
            whole = row is not None and isinstance(row[0], float) and row[1] == _sum(name, row[0])
            scores.append(float(row[0]) if whole else None)
        return scores

    def files(self, name: str) -> set[Path]:
        """Files that a reward was seen to read while it scored."""
        rows = self._file.execute("SELECT path FROM files WHERE name = ?", (name,)).fetchall()
        return {path for row in rows if (path := Path(str(row[0]))).is_file()}

    def note(self, name: str, files: Iterable[Path]) -> None:
        """Remember files that a reward was seen to read."""
        self._file.executemany("INSERT OR IGNORE INTO files VALUES (?, ?)", [(name, str(path)) for path in files])

    def write(self, keys: list[str], scores: list[float]) -> None:
        """Keep scores; those that are not finite are left out."""
        given = [(name, float(score)) for name, score in zip(keys, scores, strict=True) if np.isfinite(score)]
        try:
            self._file.execute("BEGIN")
            rows = [(name, score, _sum(name, score)) for name, score in given]
            self._file.executemany("INSERT OR REPLACE INTO signed VALUES (?, ?, ?)", rows)
            self._file.execute("COMMIT")
        except sqlite3.DatabaseError as error:
            raise Fault(f"{self._path}: cannot be written ({one_line(error)}); delete it if it is damaged") from error

    def close(self) -> None:
        self._file.close()
