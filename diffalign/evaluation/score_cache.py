"""Scores that were given before, for evaluations: never for training, never failures."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import json
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffalign.errors import Fault, one_line
from diffalign.rewards.catalog import Entry

OURS = ("reward_models", "diffalign.ops", "diffalign.rewards", "diffalign.shapes")  # what rewards that ship are made of


def version(entry: Entry) -> str | None:
    """What a reward's scores depend on besides the sample: its code and its weights; None if that cannot be known."""
    place = entry.place or entry.weights
    if entry.urls or place.startswith(("http://", "https://")):
        return None  # whatever runs behind an address may change
    if entry.source.endswith(".py"):  # with what stands beside it, which it may import
        code = _digest(sorted(Path(entry.source).parent.glob("*.py")))
    elif entry.source.startswith("reward_models."):
        code = _shipped()
    else:
        spec = importlib.util.find_spec(entry.source)
        if spec is None or spec.origin is None:
            return None
        code = _digest([Path(spec.origin)])
    local = Path(place)
    if place and local.exists():  # a file may be replaced under its name
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


def key(frames: NDArray[np.uint8], metadata: dict[str, Any], name: str, version: str) -> str:
    """Name of a sample's score: its pixels (F, H, W, 3), its prompt and metadata, the reward and its version."""
    hashed = hashlib.sha256(json.dumps([frames.shape, metadata, name, version], sort_keys=True, default=str).encode())
    hashed.update(np.ascontiguousarray(frames).data)
    return hashed.hexdigest()


class ScoreCache:
    """A SQLite file of scores by key; several processes may use it at once."""

    def __init__(self, path: Path) -> None:
        """Raises Fault if the file cannot be used."""
        self._file = sqlite3.connect(path, timeout=60, isolation_level=None)
        try:
            # No write-ahead log: to switch to it does not wait for other processes.
            self._file.execute("CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, score REAL NOT NULL)")
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
            row = self._file.execute("SELECT score FROM scores WHERE key = ?", (name,)).fetchone()
            scores.append(None if row is None else float(row[0]))
        return scores

    def write(self, keys: list[str], scores: list[float]) -> None:
        """Keep scores; those that are not finite are left out."""
        rows = [(name, float(score)) for name, score in zip(keys, scores, strict=True) if np.isfinite(score)]
        self._file.execute("BEGIN")
        self._file.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?)", rows)
        self._file.execute("COMMIT")

    def close(self) -> None:
        self._file.close()
