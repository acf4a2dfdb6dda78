"""What a reward's scores depend on besides the samples: the user's code, the files it reads, its weights."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffalign.rewards.catalog import Entry
from diffalign.runtime.files import fingerprint

_watching: list[set[Path]] = []  # hooks of the interpreter stay for good: this one does nothing unless somebody watches


def _heard(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and _watching and isinstance(arguments[0], str) and _reads(*arguments[1:]):
        for seen in _watching:
            seen.add(Path(arguments[0]))


def _reads(mode: object = None, flags: object = 0) -> bool:
    """Whether a file is opened to be read and not written: what a reward writes is no part of it."""
    if isinstance(mode, str):
        return not set(mode) & set("wax+")
    return not (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR))


@contextmanager
def opened() -> Iterator[set[Path]]:
    """Files that Python opens meanwhile, by whatever name."""
    if not _hooked:
        sys.addaudithook(_heard)
        _hooked.append(True)
    seen: set[Path] = set()
    _watching.append(seen)
    try:
        yield seen
    finally:
        _watching.remove(seen)


_hooked: list[bool] = []


def own_files(entry: Entry, seen: set[Path]) -> tuple[Path, ...]:
    """The user's files behind a reward that has been loaded: its code, what that imported or opened (`seen`) beneath its folder, and its
    weights where they were named. What ships, and what a server runs, is not among them.
    """
    files: set[Path] = set()
    if entry.source.endswith(".py"):
        source = Path(entry.source)
        code = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
        beneath = os.path.join(source.parent, "")  # as text: thousands of modules are held against it
        near = (os.path.abspath(path) for path in (*(p for p in code if p), *seen))
        files |= {source, *(path for path in map(Path, (p for p in near if p.startswith(beneath))) if _own(path))}
    for place in map(Path, entry.places if entry.place else ()):
        if place.exists():
            files |= {place.absolute()} if place.is_file() else {p.absolute() for p in place.rglob("*") if p.is_file()}
    return tuple(sorted(files))


def _own(path: Path) -> bool:
    installed = {"site-packages", "dist-packages", "__pycache__"} & set(path.parts)
    return not installed and path.suffix != ".pyc" and path.is_file()


def digest(files: tuple[Path, ...]) -> str:
    """A name for what some files hold."""
    hashed = hashlib.sha256()
    for path in files:
        hashed.update(f"{path.name} {fingerprint(path)}\n".encode())
    return hashed.hexdigest()
