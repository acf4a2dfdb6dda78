"""From a name and `key=value` to a checked config."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from diffalign.config.checks import validate
from diffalign.config.places import placed
from diffalign.config.schema import Config
from diffalign.config.short import MEANT, written_out
from diffalign.errors import UserError, one_line
from diffalign.runtime.files import is_file
from diffalign.runtime.yaml_text import parse


def folders() -> list[Path]:
    """Where configs are looked for by name: the checkout's, then the installed package's."""
    package = Path(__file__).parent.parent
    return [package.parent / "configs", package / "_configs"]


def presets() -> dict[str, Path]:
    """The configs that ship, by name such as `flow_grpo/shapes-sd3`, in the order of names; a checkout's come before the package's."""
    found = {
        str(path.relative_to(folder).with_suffix("")): path
        for folder in reversed(folders())
        for path in folder.rglob("*.yaml")
    }
    return dict(sorted(found.items()))


def find(name: str) -> Path:
    """The file of a config given as a path or as a name such as `flow_grpo/shapes-sd3`.

    Raises:
        UserError: with the nearest name there is.
    """
    inside = name.removeprefix("configs/").removesuffix(".yaml") + ".yaml"
    for path in (Path(name), *(folder / inside for folder in folders())):
        if is_file(path):
            return path
    known = presets()
    near = difflib.get_close_matches(inside.removesuffix(".yaml"), known, 1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}, or a path to a YAML file"
    raise UserError(f"config: no file {name!r}; {hint}")


def load(name: str, overrides: list[str] | tuple[str, ...] = (), ready: bool = True) -> Config:
    """Read a config, apply `key=value` overrides and check everything that can be checked without torch. ready: also that the packages
    that it needs are installed.

    Raises:
        UserError: with every mistake found.
    """
    raw, lost, problems = _read(name)
    changed: dict[str, Any] = {}
    problems += [problem for override in overrides if (problem := _override(raw, override, changed))]
    lost = {key: said for key, said in lost.items() if key not in changed}
    try:
        return validate(raw, problems, ready=ready)
    except UserError as error:
        raise UserError(*(_with_places(problem, lost) for problem in error.problems)) from None


def _with_places(problem: str, lost: dict[str, str]) -> str:
    """A problem, with where was looked for what it does not find."""
    said = lost.get(problem.partition(":")[0])
    return f"{problem}; {said}" if said else problem


def rule_of(name: str, settings: list[str]) -> dict[str, Any]:
    """The rule of a config with some settings changed by `key=value`, not yet checked.

    Raises:
        UserError: if the config has none, or a setting is not `key=value`.
    """
    raw, _, problems = _read(name)
    problems += [problem for setting in settings if (problem := _override(raw, f"rule.{setting}", {}))]
    if not isinstance(raw.get("rule"), dict):
        problems.append(f"config: {name} has no rule")
    if problems:
        raise UserError(*problems)
    return raw["rule"]


def _read(name: str) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """A config file as plain data, what it names and is not there, and mistakes in its paths."""
    path = find(name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config: cannot read {path}: {one_line(error)}") from error
    raw = parse(text, f"config: {path}")
    if not isinstance(raw, dict):
        what = "nothing" if raw is None else f"a {type(raw).__name__}"
        raise UserError(f"config: {path} holds {what}, expected keys and values")
    if strange := [key for key in raw if not isinstance(key, str)]:
        raise UserError(f"config: {path}: keys must be words, got {', '.join(map(repr, strange))}")
    raw = written_out(raw)
    raw.setdefault("run_dir", f"runs/{path.parent.name}/{path.stem}")
    return raw, *placed(raw, path.parent)


def _override(raw: dict[str, Any], text: str, changed: dict[str, Any]) -> str | None:
    """Apply one `section.key=value`; a mapping replaces, it does not merge. `changed` takes the keys that were."""
    name, equals, value = text.partition("=")
    if not equals or not all(name.split(".")):
        return f"override: got {text!r}, expected key=value"
    try:
        given = parse(value, f"override: {name}")
    except UserError as error:
        return error.problems[0]  # beside the other mistakes
    if name == "prompts" and isinstance(given, str):  # the rest of the section stays
        name = f"prompts.{MEANT['prompts']}"
    *sections, last = name.split(".")
    place = raw
    for section in sections:
        if place.get(section) is None:
            place[section] = {}
        place = place[section]
        if not isinstance(place, dict):
            return f"override: {name}: {section} is not a section"
    # On the command line a path is the shell's.
    alone: dict[str, Any] = {last: given}
    for section in reversed(sections):
        alone = {section: alone}
    alone = written_out(alone)
    _, problems = placed(alone, None)
    for section in sections:
        alone = alone[section]
    place[last] = alone[last]
    changed[name] = None
    return problems[0] if problems else None
