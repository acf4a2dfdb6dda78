"""Files that are whole or absent, and names that stand in more than one of them."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from diffalign.types import UserError, one_line

LORA = "pytorch_lora_weights.safetensors"  # diffusers' name for an adapter's file
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")  # owner/name
DDIM = "DDIMScheduler"  # in an adapter's metadata: it was trained walking DDIM


def write_text(path: Path, text: str) -> None:
    """Write a file whole: aside, synced, renamed."""
    aside = path.with_name(path.name + ".part")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def is_file(path: Path) -> bool:
    """Whether a path names a file; a name that no file system takes names none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def fingerprint(path: Path) -> str:
    """A name for a large file's content: its size, its first and its last megabyte."""
    found = hashlib.sha256(str(path.stat().st_size).encode())
    with path.open("rb") as file:
        found.update(file.read(2**20))
        file.seek(max(0, path.stat().st_size - 2**20))
        found.update(file.read())
    return found.hexdigest()


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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


def make_folder(path: Path, option: str) -> None:
    """Make the folder an option asks to write to.

    Raises:
        UserError: if that cannot be.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option}: got {str(path)!r}, cannot write there ({error.strerror})") from error
    if not os.access(path, os.W_OK):
        raise UserError(f"{option}: got {str(path)!r}, it may not be written to")
