"""What may stand at each key, in words: what it is, what is allowed, its default."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from diffalign.config.json_schema import in_full, properties
from diffalign.config.schema import Config
from diffalign.rules import RULES

NONE = object()  # of a key that must be given


@dataclass(frozen=True)
class Key:
    """A key of a config, dotted; of a rule: `rule.NAME`. default: NONE where it must be given."""

    name: str
    what: str
    allowed: str
    default: Any = NONE

    def said(self, value: Any) -> str:
        """What stands beside a value."""
        default = f"; default {written(self.default)}" if self.default is not NONE and self.default != value else ""
        return f"{self.what} [{self.allowed}{default}]"


def written(value: Any) -> str:
    """A value as YAML reads it, on one line."""
    return json.dumps(value, ensure_ascii=False)


def every() -> Iterator[Key]:
    """Every key of a config but those of its rule, in the schema's order, those within one after it; sections are no keys."""
    raw, whole = properties(Config), in_full()
    for name, of in raw.items():
        if name == "rule":
            yield _key("rule.name", {"description": "how it learns", "enum": list(RULES)})
        elif hasattr(Config.model_fields[name].annotation, "model_fields"):
            for inner, part in of["properties"].items():
                # Names that come from tables are in the whole schema alone.
                yield from _with_inner(f"{name}.{inner}", {**_names(whole[name]["properties"][inner]), **part})
        else:
            yield _key(name, {**_names(whole[name]), **of})


def rule_keys(name: str) -> Iterator[Key]:
    """Every setting of a rule, those within one after it."""
    for key, of in properties(RULES[name].Settings).items():
        yield from _with_inner(f"rule.{key}", of)


def explained(config: Config) -> list[str]:
    """The resolved config as lines of YAML, each key with what it is, what is allowed, and its default where that is another."""
    name = config.rule["name"]
    known = {key.name: key for key in (*every(), *rule_keys(name))}
    values = config.model_dump(mode="json")
    values["rule"] = {"name": name, **config.make_rule().settings.model_dump(mode="json")}
    lines = []
    for section, value in values.items():
        if section in known:
            lines.append(f"{section}: {written(value)}  # {known[section].said(value)}")
            continue
        lines.append(f"{section}:")
        for key, inner in value.items():
            lines.append(f"  {key}: {written(inner)}  # {known[f'{section}.{key}'].said(inner)}")
    return lines


def _with_inner(name: str, of: dict[str, Any]) -> Iterator[Key]:
    """A key, and those of the section that may stand there."""
    yield _key(name, of)
    within = [part["properties"] for part in of.get("anyOf", ()) if "properties" in part]
    yield from (_key(f"{name}.{inner}", part) for found in within for inner, part in found.items())


def _key(name: str, of: dict[str, Any]) -> Key:
    return Key(name, str(of.get("description", "")), allowed(of), of.get("default", NONE))


def _names(of: dict[str, Any]) -> dict[str, Any]:
    return {"enum": of["enum"]} if "enum" in of else {}


def allowed(of: dict[str, Any]) -> str:
    """What a property of a JSON schema lets stand there."""
    if "allowed" in of:
        return str(of["allowed"])
    if "enum" in of:
        return ", ".join(map(str, of["enum"]))
    if "const" in of:
        return "null" if of["const"] is None else str(of["const"])
    if "anyOf" in of:
        return " or ".join(allowed(part) for part in of["anyOf"])
    kind = of.get("type")
    if isinstance(kind, list):
        parts = [of["then"] if name == "string" else {**of, "type": name} for name in reversed(kind)]
        return " or ".join(map(allowed, parts))
    if kind in ("integer", "number"):
        return _range(of)
    if kind == "array":
        return _list(of)
    if kind == "object":
        if "properties" in of:
            return f"{{{', '.join(of['properties'])}}}"
        inner = of.get("additionalProperties")
        return "name: number" if isinstance(inner, dict) and inner.get("type") == "number" else "key: value"
    return {"boolean": "true, false", "null": "null", "string": "text"}.get(str(kind), "any")


def _list(of: dict[str, Any]) -> str:
    inner = allowed(of["items"])
    if of.get("minItems") == of.get("maxItems") == 2:
        return f"[{inner}, {inner}]"
    least = ", at least one" if of.get("minItems") else ""
    return f"list of {'words' if inner == 'text' else inner}{least}"


def _range(of: dict[str, Any]) -> str:
    whole = "whole" if of["type"] == "integer" else ""
    low, above = of.get("minimum"), of.get("exclusiveMinimum")
    high, below = of.get("maximum"), of.get("exclusiveMaximum")
    top = f"to {_number(high)}" if high is not None else f"to < {_number(below)}" if below is not None else ""
    if low is not None and top:
        return " ".join(part for part in (whole, str(low), top) if part)
    bottom = f">= {low}" if low is not None else f"> {above}" if above is not None else ""
    return ", ".join(part for part in (whole, bottom, top) if part) or "number"


def _number(value: float) -> str:
    return "2^63" if value == 2**63 else f"{value:,.10g}"
