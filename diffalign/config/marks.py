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
