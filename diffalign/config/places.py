"""Paths in a config file: `~` is the user's home, and what is read stands beside the config or in the shell's folder."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffalign.config.dotted import at
from diffalign.errors import UserError
from diffalign.models.places import parted
from diffalign.prompts.sets import SETS
from diffalign.rewards import catalog
from diffalign.runtime.files import home, is_file, is_folder
from diffalign.shapes import models

# Keys that name something to read, and what stands before the path in one: NAME@PLACE.
READ = ("model", "weights", "prompts.source", "prompts.stages", "evaluation.source", "lora.start")
WRITTEN = ("run_dir", "prompts.cache")


def placed(raw: dict[str, Any], beside: Path | None) -> tuple[dict[str, str], list[str]]:
    """Replace paths in raw settings by where they are; `beside`: the config's folder, None for the command line's settings.

    Returns:
        for every key whose path is in neither place, what to say of that; and mistakes.
    """
    lost: dict[str, str] = {}
    problems: list[str] = []

    def found(key: str, given: str) -> str:
        name = given
        after = ""
        if key == "lora.frozen":
            name, strength = parted(name)
            after = f":{strength}" if strength else ""
        before, at, path = name.rpartition("@") if "@" in name and "://" not in name else ("", "", name)
        if key in ("lora.start", "lora.frozen") and at and not _exists(Path(name)):  # RUN@130
            before, path, after, at = "", before, f"@{path}{after}", ""
        source, colon, attribute = path.rpartition(":") if ".py:" in path else (path, "", "")
        try:
            whole = home(source)
        except UserError as error:
            problems.append(f"{key}: {error}")
            return given
        if beside is not None and not Path(whole).is_absolute() and not _known(source):
            if _exists(beside / whole):
                whole = os.path.join(beside, whole)
            elif not _exists(Path(whole)):
                lost[key] = f"looked in {beside.absolute()} and {Path.cwd()}"
        return f"{before}{at}{whole}{colon}{attribute}{after}"

    for key in READ:
        _change(raw, key, functools.partial(found, key))
    for key in WRITTEN:  # to the shell's folder
        _change(raw, key, functools.partial(_home_of, problems, key))
    for key in ("rewards", "eval_rewards", "rule.gate", "rule.floors", "lora.frozen"):
        _change_all(at(raw, key), functools.partial(found, key), _is_path if key != "lora.frozen" else bool)
    return lost, problems


def _change_all(names: Any, change: Callable[[str], str], wanted: Callable[[str], bool]) -> None:
    """The names in a list, or that a mapping has values for, in place."""
    if isinstance(names, dict):
        renamed = {change(k) if isinstance(k, str) and wanted(k) else k: v for k, v in names.items()}
        names.clear()
        names.update(renamed)
    elif isinstance(names, list):
        names[:] = [change(k) if isinstance(k, str) and wanted(k) else k for k in names]


def _home_of(problems: list[str], key: str, name: str) -> str:
    try:
        return home(name)
    except UserError as error:
        problems.append(f"{key}: {error}")
        return name


def _known(name: str) -> bool:
    return name in SETS or models.path(name) is not None or "://" in name


def _is_path(reward: str) -> bool:
    return "://" not in reward and reward not in catalog.builtin() and ("/" in reward or ".py:" in reward)


def _exists(path: Path) -> bool:
    return is_file(path) or is_folder(path)


def _change(raw: dict[str, Any], key: str, change: Callable[[str], str]) -> None:
    section, _, last = key.rpartition(".")
    place = at(raw, section) if section else raw
    if isinstance(place, dict) and isinstance(place.get(last), str):
        place[last] = change(place[last])
