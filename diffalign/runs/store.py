"""A run's checkpoints as folders: which there are, which are whole, what their headers say, which may go. Needs no torch.

A checkpoint is `checkpoints/update_000010` with the trained tensors and shadows, the optimiser's state, `state.json` with all that is no
tensor, the adapter as `sample` and `export` take it, and `SHA256SUMS` over all of them. It is written aside and renamed: whole or absent.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.errors import UserError
from diffalign.runtime import numbered, signed

STATE = "state.json"
FORMAT = (
    3  # of `state.json`; a change needs a new number, an entry in `MIGRATE`, and stored runs in tests/runs/old_runs
)


def _from_2(header: dict[str, Any]) -> dict[str, Any]:
    """Format 2 had `notes` without names of their own, and did not know a run's settings or what it had taken."""
    notes = header["notes"]
    return {
        "update": header["update"],
        "rule": notes["rule"],
        "micro_batch": notes["micro_batch"],
        "skipped": notes.get("skipped", 0),
        "digests": {"prompts": notes.get("prompts", ""), "weights": notes.get("weights", "")},
        "spent": {"updates": header["update"]},
    }


# format -> the facts of a header of that format, as the next one has them
MIGRATE: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {2: _from_2}


@dataclass
class Store:
    """The checkpoints under `folder`. Those found whole are remembered: large files are read once.

    damaged: those that are not whole, as far as they were looked at.
    """

    folder: Path
    damaged: list[Path] = field(default_factory=list)
    _whole: set[Path] = field(default_factory=set)

    def place(self, update: int) -> Path:
        """The folder of the checkpoint after `update` updates."""
        return self.folder / numbered.name(update)

    def aside(self, update: int) -> Path:
        """An empty folder where that one is written first."""
        place = self.folder / f".{numbered.name(update)}.part"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        return place

    def put(self, aside: Path, update: int) -> Path:
        """Sign what was written aside and give it its name."""
        from diffalign.runtime.files import sync

        signed.sign(aside)
        for path in (*sorted(aside.iterdir()), aside):
            sync(path)
        final = self.place(update)
        if final.exists():
            _remove(final)
        aside.rename(final)
        sync(self.folder)
        self._whole.add(final)
        return final

    def complete(self) -> list[Path]:
        """Checkpoints that are whole, oldest first."""
        return [path for path in numbered.folders(self.folder).values() if self.is_whole(path)]

    def is_whole(self, path: Path) -> bool:
        """Whether every byte of a checkpoint is what was written."""
        if path not in self._whole:
            if not (signed.intact(path) or _signed_by_header(path)):
                self.damaged += [path] if path not in self.damaged else []
                return False
            self._whole.add(path)
        return path.is_dir()

    def newest(self) -> Path | None:
        """The newest whole checkpoint; damaged ones are passed over. None if there never was one.

        Raises:
            UserError: if there are some and none is whole.
        """
        for path in reversed(numbered.folders(self.folder).values()):
            if self.is_whole(path):
                return path
        if self.damaged:
            raise UserError(
                f"run_dir: no checkpoint of {self.folder.parent} is whole; choose another run_dir, or --fresh to start over"
            )
        return None

    def facts(self, path: Path) -> dict[str, Any]:
        """What the header of a whole checkpoint says, of this format or an earlier one.

        Raises:
            UserError: if a version of diffalign wrote it that this one cannot follow.
        """
        header = json.loads((path / STATE).read_text(encoding="utf-8"))
        written = header.get("format")
        if written != FORMAT and written not in MIGRATE:
            known = ", ".join(map(str, sorted([*MIGRATE, FORMAT])))
            raise UserError(
                f"run_dir: {path} was written by another version of diffalign (format {written}, this one reads {known}); "
                "use that version, choose another run_dir, or --fresh"
            )
        facts = header["state"] if written == FORMAT else header
        for older in range(written, FORMAT):
            facts = MIGRATE[older](facts)
        return facts

    def thin(self, keep: int, best: int | None = None) -> None:
        """Drop all whole checkpoints but the newest `keep` and that of update `best`."""
        for path in self.complete()[:-keep]:
            if best is None or path != self.place(best):
                _remove(path)
                self._whole.discard(path)

    def clear(self) -> None:
        """Drop every checkpoint and what was left half written; whatever else is there stays."""
        for path in (*numbered.folders(self.folder).values(), *self._left_over()):
            _remove(path)
        self._whole.clear()
        self.damaged.clear()

    def tidy(self) -> None:
        """Drop what a kill left half written."""
        for path in self._left_over():
            _remove(path)

    def _left_over(self) -> list[Path]:
        found = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        return [path for path in found if _left.fullmatch(path.name)]


_left = re.compile(r"\.update_\d{6,8}\.(part|old)")


def _remove(path: Path) -> None:
    """Delete a checkpoint so that at no moment half of one has its name."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    if not _left.fullmatch(path.name):
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        path = path.rename(old)
    shutil.rmtree(path, ignore_errors=True)


def _signed_by_header(path: Path) -> bool:
    """Whether a checkpoint of format 2 is whole: its header held the other files' digests, and nothing held its own."""
    try:
        header = json.loads((path / STATE).read_text(encoding="utf-8"))
        files = header["files"]
        return header["format"] == 2 and all(signed.digest(path / name) == told for name, told in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
