"""The schema that editors read: it says of every key what the config's own check says."""

import copy
import json

import jsonschema
import pytest
from pydantic import ValidationError

from diffalign import config as configs
from diffalign.cli import app
from diffalign.config import json_schema
from diffalign.config.decided import undecided
from diffalign.config.schema import Config
from diffalign.config.short import written_out
from diffalign.errors import UserError
from diffalign.planning import starter
from diffalign.rules import RULES
from diffalign.runtime import yaml_text
from tests.kit import ROOT

PRESETS = sorted((ROOT / "configs").rglob("*.yaml"))
SCHEMA = json_schema.schema()
VALIDATOR = jsonschema.Draft7Validator(SCHEMA)
LEAST = {"model": "shapes-sd3", "rule": {"name": "awm"}, "rewards": {"soft_colour": 1.0}, "run_dir": "x"}
# An editor marks numbers as text ("3"), and 0 and 1 for false and true; the config takes those.
POOL = [
    "auto",
    None,
    True,
    -1,
    0,
    0.5,
    1,
    2,
    10**9,
    "text",
    "",
    [],
    [1, 2],
    [0.5, 0.5],
    [0, 1, 2],
    ["text"],
    {},
    {"a": 1},
    {"a": "b"},
]


def keys() -> list[tuple[str, ...]]:
    """Every key that the schema knows: of the file, of a section, of a rule."""
    found = []
    for key, of in SCHEMA["properties"].items():
        inner = (
            of["properties"]
            if key in Config.model_fields and key not in ("rule", "rewards") and "properties" in of
            else {}
        )
        found += [(key, name) for name in inner] or [(key,)]
    for case in SCHEMA["properties"]["rule"]["allOf"]:
        rule, *names = case["then"]["properties"]
        found += [("rule", case["then"]["properties"][rule]["const"], name) for name in names]
    return found


def changed(key: tuple[str, ...], value: object) -> dict:
    raw = copy.deepcopy(LEAST)
    if len(key) == 3:
        raw["rule"] = {"name": key[1], key[2]: value}
    elif len(key) == 2:
        raw[key[0]] = {key[1]: value}
    else:
        raw[key[0]] = value
    return raw


def taken(raw: dict) -> bool:
    """Whether the config's own types take it; which names there are is checked later, from the same tables."""
    raw = written_out(raw)
    if isinstance(raw.get("sampler"), dict):
        raw = {**raw, "sampler": dict(raw["sampler"])}
    undecided(raw)
    try:
        Config(**raw)
        rule = raw["rule"]
        if not isinstance(rule, dict) or rule.get("name") not in RULES:
            return False
        RULES[rule["name"]].Settings(**{k: v for k, v in rule.items() if k != "name"})
    except ValidationError:
        return False
    return "process" not in (raw.get("sampler") or {})  # what the pool has is no process


def test_it_is_a_schema():
    """That the file holds it is a test of tests/test_docs.py."""
    jsonschema.Draft7Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_presets_name_the_schema_and_follow_it(path):
    text = path.read_text()
    first = text.splitlines()[0]
    assert first == json_schema.line("../schema.json").rstrip()
    assert (path.parent / first.partition("$schema=")[2]).resolve() == ROOT / "configs" / json_schema.FILE
    assert list(VALIDATOR.iter_errors(yaml_text.parse(text, "it"))) == []


@pytest.mark.parametrize("key", keys(), ids=".".join)
def test_it_marks_what_the_config_refuses_and_nothing_else(key):
    pool = [value for value in POOL if value not in (0, 1) or value is True or not taken(changed(key, True))]
    differ = [value for value in pool if VALIDATOR.is_valid(raw := changed(key, value)) != taken(raw)]
    assert differ == []


@pytest.mark.parametrize(
    ("raw", "where", "said"),
    [
        ({"sampler": {"steps": 1}}, "sampler.steps", "1 is less than the minimum of 2"),
        ({"sampler": {"precess": "ddim"}}, "sampler", "'precess' was unexpected"),
        ({"sampler": {"process": "ddpm"}}, "sampler.process", "'ddpm' is not one of"),
        ({"rule": {"name": "awm", "window": [0, 3]}}, "rule", "'window' was unexpected"),  # a key of another rule
        ({"rule": {"name": "grpo"}}, "rule.name", "'grpo' is not one of"),
        ({"rule": {"clip": 1}}, "rule", "'name' is a required property"),
        ({"lr": 1}, "", "'lr' was unexpected"),
        ({"device": "gpu"}, "device", "'gpu' does not match"),
    ],
)
def test_a_mistake_is_marked_where_it_is(raw, where, said):
    (error,) = VALIDATOR.iter_errors({**LEAST, **raw})
    assert ".".join(map(str, error.absolute_path)) == where
    assert said in error.message


def test_every_key_says_what_it_is():
    silent = []

    def look(properties: dict, place: str) -> None:
        for name, of in properties.items():
            if place != "rule." or name != "name":
                silent.extend([] if of.get("description") else [place + name])
            look(of.get("properties", {}), f"{place}{name}.")

    look(SCHEMA["properties"], "")
    for case in SCHEMA["properties"]["rule"]["allOf"]:
        look(case["then"]["properties"], "rule.")
    assert silent == []


def test_init_writes_the_schema_beside_the_config(tmp_path):
    starter.write(tmp_path / "mine.yaml")
    text = (tmp_path / "mine.yaml").read_text()
    beside = tmp_path / text.splitlines()[0].partition("$schema=")[2]
    validator = jsonschema.Draft7Validator(json.loads(beside.read_text()))
    assert list(validator.iter_errors(yaml_text.parse(text, "it"))) == []
    beside.write_text(json.dumps({"title": json_schema.TITLE}))  # of an older version
    starter.write(tmp_path / "second.yaml")
    assert beside.read_text() == json_schema.text()
    beside.write_text("{}")
    with pytest.raises(UserError, match=r"is there and is no schema of ours"):
        starter.write(tmp_path / "third.yaml")
    assert (beside.read_text(), (tmp_path / "third.yaml").exists()) == ("{}", False)


def test_the_command_prints_or_writes_it(tmp_path):
    from click.testing import CliRunner

    assert json.loads(CliRunner().invoke(app, ["schema"]).output) == SCHEMA
    done = CliRunner().invoke(app, ["schema", "--out", str(tmp_path / "s.json")])
    assert (tmp_path / "s.json").read_text() == json_schema.text()
    assert "# yaml-language-server: $schema=s.json" in done.output


def test_an_installed_config_finds_it_too():
    """The wheel takes the folder as a whole, so the path from a config to its schema stays."""
    included = (ROOT / "pyproject.toml").read_text()
    assert 'configs = "diffalign/_configs"' in included
    assert configs.folders()[1].name == "_configs"
