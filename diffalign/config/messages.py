"""Mistakes as lines, and a config as text."""

from __future__ import annotations

import copy
import difflib
import json
import re
from collections.abc import Sequence
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from diffalign.config.dotted import flat, within
from diffalign.config.schema import Config
from diffalign.errors import shortened, shown
from diffalign.rules import RULES
from diffalign.runtime import yaml_text


def near(name: str, known: Any) -> str:
    """A hint at the nearest known name, empty if none is near."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {close[0]}?" if close else ""


def _section(model: Any, location: tuple[Any, ...]) -> Any:
    """The section an error points into."""
    for part in location:
        field = getattr(model, "model_fields", {}).get(part)
        inner = None if field is None else _inside(field.annotation)
        if inner is None:
            break
        model = inner
    return model


def _inside(annotation: Any) -> Any:
    """The model of a key that holds keys of its own, or may; None of others."""
    return next((kind for kind in (annotation, *get_args(annotation)) if hasattr(kind, "model_fields")), None)


def _written(model: Any, location: tuple[Any, ...]) -> str:
    """What a key says of its values where its type cannot; empty if it says nothing."""
    field = _section(model, location[:-1]).model_fields.get(location[-1])
    extra = getattr(field, "json_schema_extra", None)
    return str(extra.get("allowed", "")) if isinstance(extra, dict) else ""


def explain(item: Any, model: Any, prefix: str = "") -> str:
    """One of pydantic's errors as `field: what was given, what is allowed`."""
    location = tuple(item["loc"])
    where = shortened(prefix + ".".join(str(part) for part in location))
    if item["type"] == "extra_forbidden":
        known = list(_section(model, location[:-1]).model_fields)
        hint = (
            _meant(str(location[-1]), known)
            if model is Config or len(location) == 1
            else near(str(location[-1]), known)
        )
        return f"{where}: unknown key{hint or '; known are ' + ', '.join(known)}"
    if item["type"] == "missing" and isinstance(location[-1], int):  # of a list
        return f"{where.rpartition('.')[0]}: got {shown(item['input'])}, allowed {ALLOWED['tuple_type']}"
    if item["type"] == "missing":
        return f"{where}: missing"
    got = f"{where}: got {shown(item['input'])}"
    if where == "precision" and item["input"] in ("float16", "fp16", "half"):
        return f"{got}, whose gradients underflow; allowed are float32 and bfloat16"
    if item["type"] == "model_type":
        keys = ", ".join(_section(model, location).model_fields)
        if item["input"] is None:
            return f"{where}: empty; allowed are its keys ({keys}), or leave it out"
        return f"{got}, allowed are its keys: {keys}"
    if item["type"] == "too_short":
        return f"{got}, allowed is at least {item['ctx']['min_length']} entry"
    if item["type"] == "string_pattern_mismatch" and (allowed := _written(model, location)):
        return f"{got}, allowed are {allowed}"
    if where == "rule" and item["type"] == "dict_type":
        return f"{got}, {A_RULE}"
    if item["type"] in ALLOWED:
        return f"{got}, allowed {ALLOWED[item['type']]}"
    message = item["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return f"{got}, {message.replace('input should be', 'allowed is')}"


def mistakes(errors: Sequence[Any], model: Any, prefix: str = "") -> list[str]:
    """pydantic's errors as lines. Of a key that takes several kinds of values, each kind has its own error: they are one line."""
    lines: dict[tuple[Any, ...], list[str]] = {}
    for item in errors:
        place = _choice(item["loc"], model)
        line = explain(item if place is None else {**item, "loc": place}, model, prefix)
        lines.setdefault(place or (len(lines),), []).append(line)
    return [_either(each) for each in lines.values()]


def _choice(location: tuple[Any, ...], model: Any) -> tuple[Any, ...] | None:
    """The key that an error belongs to, if that takes several kinds of values, without the kind that pydantic adds."""
    for depth, part in enumerate(location, 1):
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            return None
        kinds = [kind for kind in get_args(field.annotation) if kind is not type(None)]
        if get_origin(field.annotation) in (Union, UnionType) and len(kinds) > 1:
            return location[:depth]
        model = field.annotation
    return None


def _either(lines: list[str]) -> str:
    """Lines that begin alike and say what is allowed, as one."""
    first, _, own = lines[0].partition(", allowed ")
    others = [line.partition(", allowed ")[2] for line in lines[1:]]
    allowed = [re.sub(r"^(is|are) ", "", text).strip("'") for text in dict.fromkeys([own, *others])]
    return lines[0] if len(lines) == 1 else f"{first}, allowed is {' or '.join(allowed)}"


# What to say for pydantic's kinds of errors, where its own words are a programmer's.
ALLOWED = {
    "tuple_type": "is a list such as [0, 3]",
    "list_type": "is a list",
    "dict_type": "are keys and values, such as {key: value}",
    "string_type": "is a text",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), "is a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "is a number"),
    "finite_number": "is a finite number",
    **dict.fromkeys(("bool_type", "bool_parsing"), "are true and false"),
}

A_RULE = "expected a mapping with a name, such as {name: flow_grpo}"
# What other tools call a key.
ELSEWHERE = {
    "learning_rate": "optimizer.lr",
    "batch_size": "prompts.groups times prompts.group_size samples an update, optimizer.micro_batch at a time",
    "resolution": "sampler.pipeline_args={height: 512, width: 512}",
    **dict.fromkeys(("height", "width", "num_frames"), "sampler.pipeline_args={height: 512, width: 512}"),
    **dict.fromkeys(("max_steps", "max_train_steps", "epochs", "num_train_epochs", "num_epochs"), "updates"),
    **dict.fromkeys(("cfg", "guidance", "cfg_scale"), "sampler.guidance_scale"),
    "num_inference_steps": "sampler.steps",
    **dict.fromkeys(("dtype", "mixed_precision"), "precision"),
    **dict.fromkeys(("output_dir", "out", "output_path"), "run_dir"),
    "group": "prompts.group_size",
    "beta": "rule.kl or rule.beta, as the rule has it",
    "reward": "rewards",
    **dict.fromkeys(("pretrained_model_name_or_path", "pretrained_model", "base_model"), "model"),
    "lora_rank": "lora.rank",
    "gradient_checkpointing": "memory.checkpoint=auto",
    "lora_alpha": "lora.alpha",
    "resume": "nothing: the same command goes on",
}


def _meant(key: str, known: list[str]) -> str:
    """A hint at what an unknown key could mean: a neighbour, a key of another section, a word of other tools."""
    places = {name: f"{section}.{name}" for section, name in _inner()}
    if key in places or key in ELSEWHERE:
        return f"; did you mean {places.get(key) or ELSEWHERE[key]}?"
    return near(key, known) or near(key, places.values()) or f"; known are {', '.join(known)}"


def _inner() -> list[tuple[str, str]]:
    fields = Config.model_fields.items()
    return [(section, name) for section, field in fields for name in getattr(field.annotation, "model_fields", {})]


def settings_for(option: str) -> str:
    """A hint for a command-line option that is a key of the config; empty if it is none."""
    name = option.lstrip("-").replace("-", "_").partition("=")[0]
    keys = {key.rpartition(".")[2]: key for key in (*Config.model_fields, *(f"{s}.{n}" for s, n in _inner()))}
    place = name if name in (keys.values()) else keys.get(name) or ELSEWHERE.get(name)
    return f"; settings are written KEY=VALUE: {place}{'' if '=' in place else '=...'}" if place else ""


def dump(config: Config) -> str:
    """The resolved config as YAML."""
    return yaml_text.dump(config.model_dump(mode="json"))


# What versions did that lacked a key, where that is not its default now.
BEFORE = {"evaluation": {"least": 0}}
# Keys that were renamed: old place, new place, what its values are called now.
RENAMED = {("optimizer", "gradient_checkpointing"): ("memory", "checkpoint", {True: "spans", False: "none"})}


def renamed(values: dict[str, Any]) -> dict[str, Any]:
    """Settings with keys under the names they have now."""
    values = copy.deepcopy(values)
    for (section, old), (place, new, names) in RENAMED.items():
        inside = values.get(section)
        if (
            isinstance(inside, dict)
            and isinstance(given := inside.get(old), bool)
            and isinstance(values.get(place, {}), dict)
        ):
            del inside[old]
            values.setdefault(place, {}).setdefault(new, names[given])
    return values


def completed(values: dict[str, Any]) -> dict[str, Any]:
    """A dumped config, of whatever version, with the keys it lacks at what that version did, mostly their defaults, those of its rule too;
    unknown ones stay."""
    values = renamed(values)
    sections = {name: field.get_default(call_default_factory=True) for name, field in Config.model_fields.items()}
    defaults = _merged({k: v for k, v in _plain(sections).items() if v is not PydanticUndefined}, BEFORE)
    whole = _merged(defaults, values)
    rule = whole.get("rule")
    if isinstance(rule, dict) and rule.get("name") in RULES:
        settings = RULES[rule["name"]].Settings
        defaults = {k: f.default for k, f in settings.model_fields.items()}
        if whole["lora"].get("start") is not None and rule.get("kl", defaults.get("kl")):
            defaults["reference"] = "base"  # there was no other
        whole["rule"] = _filled(settings, _merged(defaults, rule))
    whole = _filled(Config, whole)
    return json.loads(json.dumps(whole))


def _filled(model: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Values, where a section that may be left out is there, with the keys that it lacks."""
    whole = dict(values)
    for name, field in model.model_fields.items():
        inner = _inside(field.annotation)
        if inner is not None and isinstance(given := values.get(name), dict):
            known = {k: f.get_default(call_default_factory=True) for k, f in inner.model_fields.items()}
            lacking = {k: v for k, v in _plain(known).items() if v is not PydanticUndefined}
            whole[name] = _filled(inner, {**lacking, **given})
    return whole


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v.model_dump(mode="json") if isinstance(v, BaseModel) else v for k, v in values.items()}


def _merged(defaults: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Values, and defaults where there are none, in nested sections alike; what is a mapping by itself (rewards, gate) is not merged."""
    merged = dict(defaults) | values
    for key, default in defaults.items():
        if isinstance(default, dict) and default and isinstance(values.get(key), dict):
            merged[key] = _merged(default, values[key])
    return merged


def settings(config: Config) -> dict[str, Any]:
    """All of a config as plain data, its rule's defaults too."""
    values = config.model_dump(mode="json")
    rule = config.make_rule().settings.model_dump(mode="json")  # type: ignore[attr-defined]
    values["rule"] = {key: rule.get(key, value) for key, value in values["rule"].items()}  # "0.2" is 0.2
    if "reference" in rule:  # completing is for what was written before there was a choice
        values["rule"] = {"reference": rule["reference"], **values["rule"]}
    return completed(values)


def given(config: Config) -> list[str]:
    """The keys that the user named, dotted; the others have their defaults, or what the model decides."""
    named = flat(config.model_dump(mode="json", exclude_unset=True))
    return [key for key, _ in named if not within(key, config.decided)]


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Old and new value of every key that differs, dotted."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found[f"{prefix}{key}"] = (a, b)
    return found
