"""What a user calls an adapter: PLACE or PLACE:STRENGTH. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from diffalign.errors import UserError, shown
from diffalign.models.notes import LORA, foreign, lora_folder
from diffalign.runtime.files import fingerprint, home

STRONGEST = 100


@dataclass(frozen=True)
class Adapter:
    """A LoRA's folder, or another tool's file, and how strongly it acts: 1 as trained, 0 not at all."""

    folder: Path
    strength: float = 1.0

    @property
    def digest(self) -> str:
        """A name for its content."""
        names = sorted(self.folder.glob("*.safetensors")) if self.folder.is_dir() else [self.folder]
        return "-".join(fingerprint(path)[:16] for path in names)


def parted(text: str) -> tuple[str, str]:
    """The place, and the strength if there is one: the last part after a colon, if the whole is no place."""
    name, colon, tail = text.rpartition(":")
    return (name, tail) if colon and place_of(Path(text)) is None else (text, "")


def given(text: str, key: str = "--adapter") -> Adapter:
    """PLACE, or PLACE:STRENGTH; a run folder stands for its adapter, a LoRA file of another tool, or peft's folder, for itself.

    Raises:
        UserError: if there is none; `key` is what the user gave it with.
    """
    name, tail = parted(home(text))
    strength = 1.0
    if tail or name != home(text):
        try:
            strength = float(tail)
        except ValueError:
            strength = math.nan
        if not abs(strength) <= STRONGEST:
            raise UserError(f"{key}: got {text!r}, allowed are FOLDER and FOLDER:STRENGTH, a number to +-{STRONGEST}")
    if place := place_of(Path(name)):
        return Adapter(place, strength)
    raise UserError(
        f"{key}: got {shown(text)}, no {LORA} there; allowed is FOLDER or FOLDER:STRENGTH, or a .safetensors file in its place"
    )


def place_of(path: str | Path) -> Path | None:
    """The adapter's folder, or another tool's file, that a path stands for; None if there is none."""
    return lora_folder(path) or foreign(path)
