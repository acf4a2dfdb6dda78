"""Files that are whole or absent, and names that stand in more than one of them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from diffalign.errors import UserError

UMASK = os.umask(0)  # it can only be read by setting it
os.umask(UMASK)
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")  # owner/name


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that appears under its name whole, or not at all: aside, synced, renamed."""
    aside = path.with_name(path.name + ".part")
    with aside.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a file whole."""
    with whole(path) as file:
        file.write(text.encode())


def home(path: str) -> str:
    """A path with `~` as the user's home.

    Raises:
        UserError: where that is nobody's, so that no folder named ~ is made.
    """
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError as error:
        raise UserError(f"{path!r}: no home of that name; a path that begins so is written ./{path}") from error


def share(path: Path) -> None:
    """Give a file the mode that any new file gets: safetensors writes for the user alone."""
    path.chmod(0o666 & ~UMASK)


def is_file(path: Path) -> bool:
    """Whether a path names a file; a name that no file system takes names none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: Path) -> bool:
    """Whether a path names a folder; a name that no file system takes names none."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def fingerprint(path: Path) -> str:
    """A name for a large file's content: its size, its first and its last megabyte."""
    hashed = hashlib.sha256(str(path.stat().st_size).encode())
    with path.open("rb") as file:
        hashed.update(file.read(2**20))
        file.seek(max(0, path.stat().st_size - 2**20))
        hashed.update(file.read())
    return hashed.hexdigest()


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk; Windows has no way to ask that of a folder."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
