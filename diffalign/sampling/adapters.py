"""Adapters that pictures are drawn with: ours, and LoRA files of other tools."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.errors import UserError, shown
from diffalign.models.notes import LORA, Notes, foreign, lora_folder, metadata
from diffalign.runtime.files import home

STRONGEST = 100


@dataclass(frozen=True)
class Adapter:
    """A LoRA's folder, or another tool's file, and how strongly it acts: 1 as trained, 0 not at all."""

    folder: Path
    strength: float = 1.0


def given(text: str) -> Adapter:
    """FOLDER, or FOLDER:STRENGTH; a run folder stands for its adapter, a LoRA file of another tool, or peft's folder, for itself.

    Raises:
        UserError: if there is none.
    """
    text = home(text)
    name, colon, tail = text.rpartition(":")
    folder, strength = Path(text), 1.0
    if colon and _place(folder) is None:
        folder = Path(name)
        try:
            strength = float(tail)
        except ValueError:
            strength = math.nan
        if not abs(strength) <= STRONGEST:
            raise UserError(
                f"--adapter: got {text!r}, allowed are FOLDER and FOLDER:STRENGTH, a number to +-{STRONGEST}"
            )
    if place := _place(folder):
        return Adapter(place, strength)
    raise UserError(
        f"--adapter: got {shown(text)}, no {LORA} there; allowed is FOLDER or FOLDER:STRENGTH, or a .safetensors file in its place"
    )


def _place(path: Path) -> Path | None:
    return lora_folder(path) or foreign(path)


def notes(adapter: Adapter) -> Notes:
    """What an adapter's files say of it; another tool's say nothing of that.

    Raises:
        UserError: if they are damaged.
    """
    try:
        return Notes.read(adapter.folder) if adapter.folder.is_dir() else Notes.of(metadata(adapter.folder))
    except ValueError as error:
        raise UserError(f"sample: {error}") from error


def put(pipe: Any, adapters: Sequence[Adapter], model: str) -> None:
    """Load adapters into a model's pipeline, with their strengths.

    Raises:
        UserError: if one does not fit.
    """
    from diffalign.models import lora_files

    for number, adapter in enumerate(adapters):
        load = lora_files.load if adapter.folder.is_dir() else lora_files.load_file
        try:
            load(pipe, adapter.folder, f"adapter_{number}")
        except ValueError as error:
            raise UserError(f"sample: {adapter.folder} cannot be used on {model}: {error}") from error
    if adapters:
        pipe.set_adapters([f"adapter_{k}" for k in range(len(adapters))], [a.strength for a in adapters])
