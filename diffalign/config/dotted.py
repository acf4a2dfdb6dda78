"""Nested settings by dotted keys, `section.key`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


def at(settings: Any, key: str) -> Any:
    """The value of a dotted key; None where there is none."""
    for part in key.split("."):
        settings = settings.get(part) if isinstance(settings, dict) else None
    return settings


def put(settings: dict[str, Any], key: str, value: Any) -> None:
    """Give a dotted key a value, in place; sections that are not there are made."""
    *sections, last = key.split(".")
    for section in sections:
        settings = settings.setdefault(section, {})
    settings[last] = value


def within(key: str, names: Iterable[str]) -> bool:
    """Whether a dotted key is one of some keys, or in a section that is."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key and its value; an empty mapping is a value."""
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
