"""What is said of a section that may be left out: its keys where something else is given, and its defaults where it changes."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic_core import PydanticUndefined

from diffalign import config as configs
from diffalign.config import messages
from diffalign.errors import UserError
from diffalign.rules import RULES


def optional(model: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted places of a model's sections that may be left out, with their models."""
    for key, field in model.model_fields.items():
        inner = messages._inside(field.annotation)
        if inner is not None:
            if field.default is None:
                yield before + key, inner
            yield from optional(inner, f"{before}{key}.")


OF_RULES = [(name, f"rule.{place}", inner) for name, kind in RULES.items() for place, inner in optional(kind.Settings)]
SECTIONS = [("", place, inner) for place, inner in optional(configs.Config)] + OF_RULES
every_section = pytest.mark.parametrize(
    ("rule", "place", "inner"), SECTIONS, ids=[f"{rule}{place}" for rule, place, _ in SECTIONS]
)


def nested(place: str, value: Any) -> dict[str, Any]:
    """A value at a dotted place."""
    for part in reversed(place.split(".")):
        value = {part: value}
    return value


def test_there_are_such_sections():
    assert {"sampler.cache", "prompts.scouts", "prompts.allocate"} < {place for _, place, _ in SECTIONS}
    assert {place for rule, place, _ in SECTIONS if rule == "awm"} == {"rule.data", "rule.kl_gate"}


@every_section
def test_a_key_that_a_section_lacked_is_told_at_its_default(rule, place, inner):
    """Told as a change from None, a user would look for what she had set."""
    for name, field in inner.model_fields.items():
        if field.default in (None, PydanticUndefined):
            continue
        whole = []
        for given in ({}, {name: "other"}):
            values = nested(place, given)
            if rule:
                values["rule"]["name"] = rule
            whole.append(configs.completed(values))
        plain = json.loads(json.dumps(field.default))
        assert configs.differences(*whole) == {f"{place}.{name}": (plain, "other")}


@every_section
def test_a_section_given_as_something_else_names_its_keys(rule, place, inner):
    with pytest.raises(UserError) as caught:
        configs.load("flow_grpo/shapes-sd3", [*([f"rule={rule}"] if rule else []), f"{place}=256"])
    (line,) = [line for line in caught.value.problems if line.startswith(f"{place}: ")]
    assert line == f"{place}: got 256, allowed are its keys: {', '.join(inner.model_fields)}"
