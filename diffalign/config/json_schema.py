"""The config as a JSON schema, which editors complete and mark with. Draft 7, without references: what their YAML servers read."""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from typing import Any

from diffalign.config.decided import AUTO, OPEN
from diffalign.config.schema import Config
from diffalign.errors import UserError
from diffalign.processes import PROCESSES
from diffalign.prompts.sets import SETS
from diffalign.rewards import catalog
from diffalign.rules import RULES
from diffalign.runtime.files import write_text
from diffalign.runtime.precision import PRECISIONS, SHORT
from diffalign.shapes import models

FILE = "schema.json"  # beside the folders of configs
BESIDE = ".diffalign.schema.json"  # beside a user's config, wherever that is
TITLE = "a config of diffalign"
TEXT = {"type": "string"}
_OURS = (
    "title",
    "resume",
    "allowed",
    "tune",
)  # titles are the keys again; the others are read by `marks`, `legend` and `tune`


def line(schema: str) -> str:
    """The first line of a config, by which editors find its schema; a path is taken from the config's folder."""
    return f"# yaml-language-server: $schema={schema}\n"


def in_full() -> dict[str, dict[str, Any]]:
    """The keys of a config that is written out, with the names that come from tables."""
    keys = properties(Config)
    keys["rule"] = _rule()
    keys["model"]["examples"] = models.names()
    keys["rewards"]["properties"] = {
        name: {"type": "number", "description": entry.about} for name, entry in catalog.builtin().items()
    }
    keys["eval_rewards"]["items"] = {"type": "string", "examples": list(catalog.builtin())}
    keys["prompts"]["properties"]["source"]["examples"] = list(SETS)
    precisions = [*PRECISIONS, *(short for short, name in SHORT.items() if name in PRECISIONS)]
    for section, name, words in (
        (keys["sampler"]["properties"], "process", list(PROCESSES)),
        (keys, "precision", precisions),
        (keys["memory"]["properties"], "judge_precision", precisions),
    ):
        decided = [AUTO] if section[name].get("default") == AUTO else []
        section[name] = {k: v for k, v in section[name].items() if k != "anyOf"} | {"enum": [*decided, *words]}
    return keys


def schema() -> dict[str, Any]:
    """Of a whole config file: what can be said of its keys one by one; what must go together is checked when it is read."""
    keys = in_full()
    trackers = keys["output"]["properties"]["trackers"]
    # Short forms, see `config.short`. What is said of mappings or lists says nothing of a text.
    for of, kinds, more in (
        (keys["rule"], ["object", "string"], {"if": {"type": "string"}, "then": {"enum": list(RULES)}}),
        (keys["prompts"], ["object", "string"], {}),
        (
            keys["rewards"],
            ["object", "string", "array"],
            {"items": TEXT, "minItems": 1, "uniqueItems": True},
        ),
        (keys["eval_rewards"], ["array", "string"], {}),
        (trackers, ["array", "string"], {"if": {"type": "string"}, "then": trackers["items"]}),
    ):
        of.update({"type": kinds, **more})
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": TITLE,
        "type": "object",
        "required": ["model", "rule"],
        # Rules that ask no rewards are given none.
        "if": {"properties": {"rule": {"type": "object", "properties": {"name": {"enum": _unrewarded()}}}}},
        "else": {"required": ["rewards"]},
        "properties": _cleared(keys),
        "additionalProperties": False,
    }


def _unrewarded() -> list[str]:
    return [name for name, rule in RULES.items() if not rule().needs.rewards]


def text() -> str:
    """The schema as a file."""
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"


def write_beside(place: Path) -> None:
    """Write the schema beside a config; an older one of ours is replaced.

    Raises:
        UserError: if a file of that name is somebody else's.
    """
    path = Path(os.path.abspath(place)).parent / BESIDE
    if path.exists():
        try:
            ours = json.loads(path.read_text(encoding="utf-8")).get("title") == TITLE
        except (ValueError, AttributeError, OSError):
            ours = False
        if not ours:
            raise UserError(f"init: {path} is there and is no schema of ours; allowed is to move it away")
    write_text(path, text())


def properties(model: Any) -> dict[str, dict[str, Any]]:
    """The keys of a section's class or of a rule's settings, as a JSON schema says them, sections within written out."""
    found = model.model_json_schema()
    keys: dict[str, dict[str, Any]] = _inlined(found["properties"], found.get("$defs", {}))
    for section, _, name in (key.rpartition(".") for key in OPEN if model is Config):
        of = keys[section]["properties"] if section else keys
        of[name] = _by_model(of[name])
    return keys


def _by_model(of: dict[str, Any]) -> dict[str, Any]:
    """A key that the model decides unless it is named."""
    if of.get("default") == AUTO or AUTO in of.get("enum", ()):  # it knows the word
        return {**of, "default": AUTO}
    if "anyOf" in of:
        return {**of, "anyOf": [{"const": AUTO}, *of["anyOf"]], "default": AUTO}
    if of["type"] == "string":  # what it may be comes from a table
        return {**of, **({"enum": [AUTO, *of["enum"]]} if "enum" in of else {}), "default": AUTO}
    word = {"if": TEXT, "then": {"const": AUTO}}  # so that a wrong number is said to be one
    return {**of, "type": [of["type"], "string"], **word, "default": AUTO}


def summary(thing: Any) -> str:
    """The first sentence of what a class says of itself."""
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


def rules() -> dict[str, str]:
    """The update rules, each with its first sentence."""
    return {name: summary(rule) for name, rule in RULES.items()}


def _rule() -> dict[str, Any]:
    """The name decides which keys there are."""
    name = {"enum": list(RULES), "description": "; ".join(f"{n}: {said}" for n, said in rules().items())}
    cases = []
    for own, rule in RULES.items():
        keys = {"name": {"const": own}, **properties(rule.Settings)}
        of = {"properties": {"name": {"const": own}}, "required": ["name"]}
        cases.append({"if": of, "then": {"properties": keys, "additionalProperties": False}})
    about = Config.model_fields["rule"].description
    return {"type": "object", "description": about, "required": ["name"], "properties": {"name": name}, "allOf": cases}


def _inlined(part: Any, definitions: dict[str, Any]) -> Any:
    """With references replaced by what they point to, and pairs in a form that every draft has."""
    if isinstance(part, list):
        return [_inlined(item, definitions) for item in part]
    if not isinstance(part, dict):
        return part
    reference = part.get("$ref")
    if isinstance(reference, str):
        part = {**definitions[reference.rpartition("/")[2]], **{k: v for k, v in part.items() if k != "$ref"}}
    if isinstance(pair := part.get("prefixItems"), list):  # ours have one kind of item
        part = {**{k: v for k, v in part.items() if k != "prefixItems"}, "items": pair[0]}
    return {key: _inlined(value, definitions) for key, value in part.items()}


def _cleared(part: Any, names: bool = True) -> Any:
    """Without what only we read; `names`: the keys of this mapping are a config's, not a schema's."""
    if isinstance(part, list):
        return [_cleared(item, names=False) for item in part]
    if not isinstance(part, dict):
        return part
    kept = part if names else {k: v for k, v in part.items() if k not in _OURS}
    return {key: _cleared(value, names=key == "properties" and not names) for key, value in kept.items()}
