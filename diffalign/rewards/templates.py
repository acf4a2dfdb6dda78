"""Questions that learned judges were trained with: their authors' texts, which do not come with this package.

A judge is asked in exactly its own words: a text is taken for what its checksum says it is, or not at all. It is read out of a source
file without running that: from a wheel, a checkout, the installed package, or a file that holds nothing else.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffalign.errors import UserError
from diffalign.rewards.catalog import Entry, builtin, shipped
from diffalign.runtime.files import write_text
from diffalign.runtime.launcher import cache_folder

FILE = "template.txt"
Facts = Mapping[str, Any]  # file, names, sha256 and package of a card's `template`


def kept(name: str, place: str | None) -> Path:
    """Where a judge's text is written: beside its weights, or in the user's cache."""
    return cache_folder() / "diffalign" / "templates" / f"{name}.txt" if place is None else Path(place) / FILE


def of(name: str, place: str | None = None) -> str:
    """A judge's text: from beside its weights, from what was fetched before, or from its installed package.

    Raises:
        FileNotFoundError: with the command that fetches it.
        ValueError: if what is there is another text.
    """
    facts = builtin()[name].template
    for path in (kept(name, place), kept(name, None)):
        if path.is_file():
            return _checked(path.read_bytes().decode("utf-8", "replace"), facts, str(path))
    package = facts.get("package")
    spec = importlib.util.find_spec(package) if package else None
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        source = Path(folder).parent / facts["file"]
        if source.is_file():
            return _checked(_literals(source.read_text(encoding="utf-8"), facts, str(source)), facts, str(source))
    shown = name if place is None else f"{name}@{place}"
    raise FileNotFoundError(f"its question is not here; diffalign rewards fetch {shown} --from WHEEL_OR_CHECKOUT")


def fetch(entry: Entry, source: Path) -> Path:
    """Take a judge's text out of its authors' wheel, checkout or file, and keep it; returns where.

    Raises:
        UserError: if the reward asks none, or it is not in there, or is another text.
    """
    name, facts = shipped(entry.name), entry.template
    if not facts:
        able = ", ".join(key for key, other in builtin().items() if other.template)
        raise UserError(f"rewards: {entry.name} has no question of its authors'; allowed are {able}")
    if entry.place is not None and not Path(entry.place).is_dir():
        raise UserError(f"rewards: {entry.place} is no folder; without a place the text is kept in {kept(name, None)}")
    try:
        if source.is_dir():
            text = _literals(_found(source, facts["file"]).read_text(encoding="utf-8"), facts, str(source))
        elif zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as wheel:
                text = _literals(wheel.read(facts["file"]).decode("utf-8"), facts, str(source))
        elif source.suffix == ".py":
            text = _literals(source.read_text(encoding="utf-8"), facts, str(source))
        else:
            text = source.read_bytes().decode("utf-8")
        _checked(text, facts, str(source))
    except (OSError, KeyError, ValueError, SyntaxError) as error:
        why = str(error) if type(error) is ValueError else f"{source} has no {facts['file']} that can be read"
        raise UserError(f"--from: {name}: {why}") from error
    path = kept(name, entry.place)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return path


def _found(folder: Path, file: str) -> Path:
    """A file of a checkout, or of a folder above it."""
    direct = folder / file
    return direct if direct.is_file() else next(iter(sorted(folder.rglob(Path(file).name))), direct)


def _literals(source: str, facts: Facts, where: str) -> str:
    """The texts that a module gives names to, one after another."""
    values: dict[str, Any] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            values |= {target.id: node.value.value for target in node.targets if isinstance(target, ast.Name)}
    if lacking := [name for name in facts["names"] if not isinstance(values.get(name), str)]:
        raise ValueError(f"{where} has no text {lacking[0]} in {facts['file']}")
    return "".join(values[name] for name in facts["names"])


def _checked(text: str, facts: Facts, where: str) -> str:
    found = hashlib.sha256(text.encode()).hexdigest()
    if found != facts["sha256"]:
        raise ValueError(
            f"{where}: its question has checksum {found[:16]}, the judge was trained with {facts['sha256'][:16]}"
        )
    return text
