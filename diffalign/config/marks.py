"""What of a config may change when a run is taken up again: `held`, `free` or `on request`, as the schema marks it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffalign.config.schema import Config


def mark(key: str) -> str:
    """The mark of a dotted key; a rule's name is held, its settings are not."""
    if key == "rule.name":
        return "held"
    model, found = Config, "held"
    for part in key.split("."):
        found = _said(model.model_config, found)
        field = model.model_fields.get(part)
        if field is None:  # a mapping of the user's own, or the key of another version
            break
        extra = field.json_schema_extra
        found = _said({"json_schema_extra": extra}, found)
        if not hasattr(field.annotation, "model_fields"):
            break
        model = field.annotation  # type: ignore[assignment]
        found = _said(model.model_config, found)
    return found


def table() -> list[str]:
    """The marks as a table in Markdown, for docs/run-folder.md: a section whose keys share one mark is one row."""
    by_mark: dict[str, list[str]] = {"free": [], "on request": [], "held": []}
    for key, found in marks():
        by_mark[found].append(key)
    lines = ["| may change | keys |", "|---|---|"]
    for found, keys in by_mark.items():
        lines.append(f"| {found} | {', '.join(f'`{key}`' for key in _gathered(keys))} |")
    return lines


def _gathered(keys: list[str]) -> list[str]:
    """Keys, those that are a whole section as `section.*`."""
    sections = {n: set(getattr(f.annotation, "model_fields", ())) for n, f in Config.model_fields.items()}
    whole = {name for name, parts in sections.items() if parts and all(f"{name}.{part}" in keys for part in parts)}
    return list(dict.fromkeys(f"{key.partition('.')[0]}.*" if key.partition(".")[0] in whole else key for key in keys))


def _said(config: Any, otherwise: str) -> str:
    extra = config.get("json_schema_extra")
    return extra["resume"] if isinstance(extra, dict) and "resume" in extra else otherwise


def marks() -> Iterator[tuple[str, str]]:
    """Every key of a config with its mark, in the schema's order."""
    for name, field in Config.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        for key in [name] if inner is None else [f"{name}.{part}" for part in inner]:
            yield key, mark(key)
    yield "rule.name", mark("rule.name")
