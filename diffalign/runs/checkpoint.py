"""Checkpoints that are whole or absent: written aside, read back, renamed.

A checkpoint is a folder `checkpoints/update_000010` with the trained tensors and shadows (safetensors), the optimiser's state
(torch, loaded with `weights_only=True`), and `state.json` with the position, the rule's state and every file's SHA-256. Randomness needs
no state: every draw is keyed by (seed, update, sample).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.runtime.files import sync, write_text
from diffalign.errors import Fault, UserError, one_line

STATE = "state.json"
FORMAT = 2  # of the folder's content: grows when older ones cannot be read


@dataclass(frozen=True)
class State:
    """All that a run needs to go on: `update` updates are done; notes are JSON-serialisable."""

    update: int
    parameters: dict[str, Tensor]
    shadows: dict[str, dict[str, Tensor]]
    optimizer: dict[str, Any]
    notes: dict[str, Any]


def _name(update: int) -> str:
    return f"update_{update:06d}"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def save(folder: Path, state: State, keep: int, best: int | None = None) -> Path:
    """Write a checkpoint under `folder` and drop all but the newest `keep` and that of update `best`.

    Raises:
        Fault: if it cannot be written or reads back differently; what was there before stays.
    """
    final = folder / _name(state.update)
    aside = folder / f".{final.name}.part"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        tensors = {f"parameters/{k}": v.detach().cpu().contiguous() for k, v in state.parameters.items()}
        for name, shadow in state.shadows.items():
            tensors |= {f"shadows/{name}/{k}": v.cpu().contiguous() for k, v in shadow.items()}
        save_file(tensors, aside / "tensors.safetensors")
        torch.save(state.optimizer, aside / "optimizer.pt")
        files = {path.name: _digest(path) for path in sorted(aside.iterdir())}
        back = load_file(aside / "tensors.safetensors")
        if back.keys() != tensors.keys() or not all(torch.equal(back[k], v) for k, v in tensors.items()):
            raise Fault(f"checkpoint: {final} reads back differently from what was written")
        header = {"format": FORMAT, "update": state.update, "files": files, "notes": state.notes}
        write_text(aside / STATE, json.dumps(header))
        for path in (*sorted(aside.iterdir()), aside):
            sync(path)
        if final.exists():
            shutil.rmtree(final)
        aside.rename(final)
        sync(folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        raise Fault(f"checkpoint: cannot write {final}: {one_line(error)}") from error
    for old in complete(folder)[:-keep]:
        if best is None or old.name != _name(best):
            shutil.rmtree(old, ignore_errors=True)
    return final


def complete(folder: Path) -> list[Path]:
    """Checkpoints that are whole, oldest first; damaged ones are left out."""
    return [path for path in sorted(folder.glob("update_*")) if _whole(path)]


def _whole(path: Path) -> bool:
    try:
        files = json.loads((path / STATE).read_text(encoding="utf-8"))["files"]
        return all(_digest(path / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError):
        return False


def load(path: Path) -> State:
    """Read a whole checkpoint.

    Raises:
        UserError: if another version of diffalign wrote it.
    """
    header = json.loads((path / STATE).read_text(encoding="utf-8"))
    if header.get("format") != FORMAT:
        raise UserError(
            f"run_dir: {path} was written by another version of diffalign; choose another run_dir, or --fresh"
        )
    parameters: dict[str, Tensor] = {}
    shadows: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(path / "tensors.safetensors").items():
        kind, _, rest = name.partition("/")
        if kind == "parameters":
            parameters[rest] = tensor
        else:
            shadow, _, key = rest.partition("/")
            shadows.setdefault(shadow, {})[key] = tensor
    optimizer = torch.load(path / "optimizer.pt", weights_only=True)
    return State(header["update"], parameters, shadows, optimizer, header["notes"])
