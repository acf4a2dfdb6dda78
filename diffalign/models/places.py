"""What a user calls an adapter: PLACE or PLACE:STRENGTH, a place being here or on the hub. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from diffalign.errors import UserError, shown
from diffalign.models import hub_files
from diffalign.models.hub_files import HubPlace
from diffalign.models.notes import LORA, files_of, foreign, lora_folder
from diffalign.runtime.files import fingerprint, home

STRONGEST = 100
PLACES = "a run's or adapter's folder, a .safetensors file, peft's folder, or OWNER/NAME on the hub"


@dataclass(frozen=True)
class Adapter:
    """A LoRA's folder, or another tool's file, and how strongly it acts: 1 as trained, 0 not at all. commit: where on the hub it is
    from, with the commit; empty: from here."""

    folder: Path
    strength: float = 1.0
    commit: str = ""

    @property
    def digest(self) -> str:
        """A name for its content."""
        names = files_of(self.folder) if self.folder.is_dir() else [self.folder]
        return "-".join(fingerprint(path)[:16] for path in names)

    def __str__(self) -> str:
        return self.commit or str(self.folder)

    @property
    def place(self) -> str:
        """What finds this content again: on the hub its commit, else the path."""
        return self.commit or str(self.folder.absolute())


def parted(text: str) -> tuple[str, str]:
    """The place, and the strength if there is one: the last part after a colon, if the whole is no place."""
    name, colon, tail = text.rpartition(":")
    return (name, tail) if colon and place_of(Path(text)) is None else (text, "")


def named(text: str, key: str) -> tuple[str, float]:
    """The place and strength of PLACE or PLACE:STRENGTH: one that is here, or that can be one of the hub, where nothing is asked.

    Raises:
        UserError: if it is neither; `key` is what the user gave it with.
    """
    name, tail = parted(home(text))
    strength = 1.0
    if tail or name != home(text):
        try:
            strength = float(tail)
        except ValueError:
            strength = math.nan
        if not abs(strength) <= STRONGEST:
            raise UserError(f"{key}: got {text!r}, allowed are PLACE and PLACE:STRENGTH, a number to +-{STRONGEST}")
    if place_of(name) is None and HubPlace.of(name) is None:
        raise UserError(
            f"{key}: got {shown(text)}, no {LORA} there; allowed is {PLACES}, or one of them with :STRENGTH"
        )
    return name, strength


def given(text: str, key: str = "--adapter") -> Adapter:
    """The adapter of PLACE or PLACE:STRENGTH; a run folder stands for its adapter, a LoRA file of another tool, or peft's folder, for
    itself. What is on the hub is fetched.

    Raises:
        UserError: if there is none; `key` is what the user gave it with.
        Fault: if the hub cannot be reached.
    """
    return found(*named(text, key), key)


def found(name: str, strength: float, key: str) -> Adapter:
    """The adapter at a place.

    Raises:
        UserError: if there is none; `key` is what the user gave it with.
        Fault: if the hub cannot be reached.
    """
    if place := place_of(name):
        return Adapter(place, strength)
    if (there := HubPlace.of(name)) is None:
        raise UserError(f"{key}: got {shown(name)}, no {LORA} there; allowed is {PLACES}")
    path, exact = hub_files.fetch(there, key)
    return Adapter(place_of(path) or path, strength, str(exact))


def place_of(path: str | Path) -> Path | None:
    """The adapter's folder, or another tool's file, that a path stands for; None if there is none."""
    return lora_folder(path) or foreign(path)
