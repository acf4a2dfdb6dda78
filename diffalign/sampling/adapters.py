"""Adapters that pictures are drawn with: ours, and LoRA files of other tools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffalign.errors import UserError
from diffalign.models import places
from diffalign.models.hub_files import HubPlace
from diffalign.models.notes import Notes, metadata
from diffalign.models.places import Adapter


def notes(adapter: Adapter) -> Notes:
    """What an adapter's files say of it; another tool's say nothing of that.

    Raises:
        UserError: if they are damaged.
    """
    try:
        return Notes.read(adapter.folder) if adapter.folder.is_dir() else Notes.of(metadata(adapter.folder))
    except ValueError as error:
        raise UserError(f"sample: {adapter}: {error}" if adapter.folder.is_file() else f"sample: {error}") from error


def frozen(folder: Path, notes: Notes) -> tuple[Adapter, ...]:
    """What an adapter was trained on top of, still there and the same; what is on the hub is fetched.

    Raises:
        UserError: if one is not.
    """
    found = []
    for spec in notes.frozen:
        place = spec["place"]
        here = Path(place).exists() or HubPlace.of(place) is None
        adapter = Adapter(Path(place)) if here else places.found(place, 1.0, "sample")
        if not adapter.folder.exists():
            raise UserError(f"sample: {folder} was trained on top of {adapter}, which is not there; restore it")
        if adapter.digest != spec["digest"]:
            raise UserError(f"sample: {folder} was trained on top of {adapter}, which is another now; restore it")
        adapter = replace(adapter, strength=float(spec["strength"]))
        found.append(adapter)
    return tuple(found)


def put(pipe: Any, adapters: Sequence[Adapter], model: str) -> None:
    """Load adapters into a model's pipeline, with their strengths.

    Raises:
        UserError: if one does not fit.
    """
    from diffalign.models import lora_files

    for name, adapter in zip(names(len(adapters)), adapters, strict=True):
        try:
            lora_files.load(pipe, adapter.folder, name)
        except ValueError as error:
            raise UserError(f"sample: {adapter} cannot be used on {model}: {error}") from error
    if adapters:
        pipe.set_adapters(names(len(adapters)), [a.strength for a in adapters])


def names(count: int) -> list[str]:
    """Of so many adapters, in the pipeline."""
    return [f"adapter_{number}" for number in range(count)]
