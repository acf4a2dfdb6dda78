"""Scores that were given before, for evaluations: never for training, never failures."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffalign.rewards.catalog import Entry


def version(entry: Entry) -> str | None:
    """What a reward's scores depend on besides the sample: its code and the place of its weights; None if that cannot be known."""
    if entry.urls:
        return None  # whatever runs behind an address may change
    path = Path(entry.source)
    if path.suffix != ".py":
        import importlib.util

        spec = importlib.util.find_spec(entry.source)
        if spec is None or spec.origin is None:
            return None
        path = Path(spec.origin)
    from diffalign import __version__

    place = entry.place or entry.weights
    local = Path(place)
    if place and local.exists():  # a file may be replaced under its name
        files = [local] if local.is_file() else sorted(p for p in local.rglob("*") if p.is_file())
        place += "".join(f"|{p} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files)
    code = hashlib.sha256(path.read_bytes()).hexdigest()
    return f"{entry.attribute} {code} {place} {__version__}"


def key(frames: NDArray[np.uint8], metadata: dict[str, Any], name: str, version: str) -> str:
    """Name of a sample's score: its pixels (F, H, W, 3), its prompt and metadata, the reward and its version."""
    found = hashlib.sha256(json.dumps([frames.shape, metadata, name, version], sort_keys=True, default=str).encode())
    found.update(np.ascontiguousarray(frames).data)
    return found.hexdigest()


class ScoreCache:
    """A SQLite file of scores by key; several processes may use it at once."""

    def __init__(self, path: Path) -> None:
        self._file = sqlite3.connect(path, timeout=60, isolation_level=None)
        self._file.execute("PRAGMA journal_mode=WAL")
        self._file.execute("CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, score REAL NOT NULL)")

    def read(self, keys: list[str]) -> list[float | None]:
        """Scores by key, None where there is none."""
        found = []
        for name in keys:
            row = self._file.execute("SELECT score FROM scores WHERE key = ?", (name,)).fetchone()
            found.append(None if row is None else float(row[0]))
        return found

    def write(self, keys: list[str], scores: list[float]) -> None:
        """Keep scores; those that are not finite are left out."""
        rows = [(name, float(score)) for name, score in zip(keys, scores, strict=True) if np.isfinite(score)]
        self._file.execute("BEGIN")
        self._file.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?)", rows)
        self._file.execute("COMMIT")

    def close(self) -> None:
        self._file.close()
