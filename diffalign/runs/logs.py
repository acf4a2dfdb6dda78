"""A run's logs: `metrics.jsonl`, a row an update or evaluation, and `scores.jsonl`, every sample's scores. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.errors import Fault
from diffalign.runtime import keys
from diffalign.runtime.files import write_text
from diffalign.types import Prompts, Scores

METRICS, SCORES = "metrics.jsonl", "scores.jsonl"


def _silent(line: str) -> None:
    pass


@dataclass
class Logs:
    """The log files of a folder; `say` hears of lines that cannot be read. Each line is on the disk before the next thing happens."""

    folder: Path
    say: Callable[[str], None] = _silent
    _hashed: dict[str, Any] = field(default_factory=dict)

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
        path, line = self.folder / name, (json.dumps(row) + "\n").encode()
        try:
            with path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise Fault(f"{path}: cannot write ({error.strerror or error})") from error
        self._hash(name).update(line)

    def _hash(self, name: str) -> Any:
        """Of all lines so far; grows with them, so that to sign a long log costs nothing."""
        return self._hashed.setdefault(name, hashlib.sha256())

    def digests(self) -> dict[str, str]:
        """Of each file that was written to."""
        return {name: hashed.hexdigest() for name, hashed in self._hashed.items()}

    def rows(self) -> list[dict[str, Any]]:
        """The objects of `metrics.jsonl`."""
        return read_rows(self.folder)

    def rewind(self, update: int, signed: dict[str, str]) -> None:
        """Drop rows of more than `update` updates: they will be made again. So is what follows the lines that `signed` is of, those the run
        had logged when it was saved, unless an evaluation is in it: it ends what a run logs after its last update. What differs from
        `signed` is said.
        """
        for name in (METRICS, SCORES):
            rows, broken = scanned(self.folder, name)
            rows = [row for row in rows if row["update"] <= update]
            lines = [(json.dumps(row) + "\n").encode() for row in rows]
            kept = _signed(lines, signed.get(name))
            if kept is not None and not any(keys.COUNT in row for row in rows[kept:]):
                lines = lines[:kept]
            self._hashed.pop(name, None)
            if name == METRICS or (self.folder / name).is_file():
                if broken:
                    self.say(
                        f"{self.folder / name}: left out what is no row of a run: line {', '.join(map(str, broken))}"
                    )
                content = b"".join(lines)
                write_text(self.folder / name, content.decode())
                self._hash(name).update(content)
            if name in signed and kept is None:
                self.say(
                    f"{self.folder / name} is not what the run logged up to update {update}; it goes on from there"
                )

    def evaluated(self, update: int) -> bool:
        """Whether an evaluation after some updates is in `metrics.jsonl`."""
        return any(row["update"] == update and keys.COUNT in row for row in self.rows())


def _signed(lines: list[bytes], digest: str | None) -> int | None:
    """How many of a log's first lines a digest is of; None if of none."""
    hashed = hashlib.sha256()
    for number, line in enumerate([b"", *lines]):
        hashed.update(line)
        if hashed.hexdigest() == digest:
            return number
    return None


def read_rows(folder: Path, name: str = METRICS) -> list[dict[str, Any]]:
    """The metrics of a run, or its scores, one object an update; what cannot be read is left out."""
    return scanned(folder, name)[0]


def scanned(folder: Path, name: str) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows of a log, and the numbers of lines that are none; not of the last one, which a kill may cut short."""
    path = folder / name
    if not path.is_file():
        return [], []
    rows: list[dict[str, Any]] = []
    broken: list[int] = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        row = _row(line, name)
        if row is not None:
            rows.append(row)
        elif line.strip() and number < len(lines):
            broken.append(number)
    return rows, broken


def _row(line: bytes, name: str) -> dict[str, Any] | None:
    """A line's object, if it is one that a run wrote."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("update")) is not int or row["update"] < 0:
        return None
    numbers = name != METRICS or all(type(value) in (int, float) for value in row.values())
    return row if numbers else None
