"""What stands in an adapter's folder: its file's name, and the notes in it."""

from __future__ import annotations

from pathlib import Path

from diffalign.errors import one_line
from diffalign.runtime.files import is_file

LORA = "pytorch_lora_weights.safetensors"  # diffusers' name for an adapter's file


DDIM = "DDIMScheduler"  # in an adapter's metadata: it was trained walking DDIM


def lora_folder(place: str | Path) -> Path | None:
    """The folder with a LoRA that a run's or an adapter's folder stands for; None if there is none."""
    return next((folder for folder in (Path(place) / "adapter", Path(place)) if is_file(folder / LORA)), None)


def lora_notes(folder: Path) -> dict[str, str]:
    """The notes in an adapter's file.

    Raises:
        ValueError: if it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / LORA, framework="np") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder} holds a damaged adapter: {one_line(error)}") from error
