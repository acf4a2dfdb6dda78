"""What stands in an adapter's folder: its files, and the notes in them. Needs no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from diffalign.errors import one_line
from diffalign.runtime.files import is_file

LORA = "pytorch_lora_weights.safetensors"  # diffusers' name for an adapter's file
DDIM = "DDIMScheduler"  # in an adapter's notes: it was trained walking DDIM
FORMAT = 2  # of the notes; a change of what they mean needs a new number. 1: without a number


@dataclass(frozen=True)
class Notes:
    """Where an adapter comes from and how it is called; empty where a file says nothing of that.

    base_model, base_revision, base_weights, base_weights_digest: what it was trained on: a name, a commit of the hub, a single file and
    its fingerprint; denoisers: their classes; updates: how many it was trained for; call: arguments of the pipeline's call that give what
    training saw; scheduler: `DDIM` if it was walked.
    """

    base_model: str = ""
    base_revision: str = ""
    base_weights: str = ""
    base_weights_digest: str = ""
    denoisers: list[str] = field(default_factory=list)
    rule: dict[str, Any] = field(default_factory=dict)
    rewards: dict[str, float] = field(default_factory=dict)
    seed: int = 0
    updates: int = 0
    precision: str = ""
    diffalign_version: str = ""
    call: dict[str, Any] = field(default_factory=dict)
    scheduler: str = ""

    def written(self) -> dict[str, str]:
        """As metadata of a safetensors file: strings."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        strings = {k: v if isinstance(v, str) else json.dumps(v, sort_keys=True) for k, v in values.items()}
        return strings | {"notes_format": str(FORMAT)}

    @classmethod
    def of(cls, metadata: dict[str, str]) -> Notes:
        """From a file's metadata; other tools' have none of these keys.

        Raises:
            ValueError: if they are not what `written` makes, or of a later format.
        """
        if (written := metadata.get("notes_format", "1")) not in map(str, range(1, FORMAT + 1)):
            raise ValueError(f"its notes have format {written}, this version reads up to {FORMAT}")
        kinds = {f.name: type(getattr(cls(), f.name)) for f in fields(cls)}
        values: dict[str, Any] = {}
        for name, kind in kinds.items():
            if name in metadata:
                try:
                    values[name] = metadata[name] if kind is str else json.loads(metadata[name])
                except ValueError as error:
                    raise ValueError(f"its note {name} is not JSON") from error
                if not isinstance(values[name], kind):
                    raise ValueError(f"its note {name} is {metadata[name][:80]!r}, expected a {kind.__name__}")
        return cls(**values)

    @classmethod
    def read(cls, folder: Path) -> Notes:
        """Of an adapter's folder.

        Raises:
            ValueError: if its file is damaged, or its notes are.
        """
        try:
            return cls.of(metadata(folder / LORA))
        except ValueError as error:
            raise ValueError(f"{folder} holds a damaged adapter: {error}") from error


def metadata(path: Path) -> dict[str, str]:
    """A safetensors file's metadata.

    Raises:
        ValueError: if the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise ValueError(one_line(error)) from error


def lora_folder(place: str | Path) -> Path | None:
    """The folder with a LoRA that a run's or an adapter's folder stands for; None if there is none."""
    return next((folder for folder in (Path(place) / "adapter", Path(place)) if is_file(folder / LORA)), None)


def files_of(folder: Path) -> list[Path]:
    """An adapter's files: one, or one for each of two experts."""
    return sorted(folder.glob(LORA.replace(".safetensors", "*.safetensors")))
