"""What may stand at each key, in words."""

import pytest

from diffalign import config as configs
from diffalign.config import legend
from diffalign.rules import RULES
from diffalign.shapes import models

LONGEST = 140
WIDER = {"attention"}  # names of eight backends
KINDS = {"ddpo": "sd", "truncated_bp": "flux"}
PRESETS = [f"{rule}/shapes-{KINDS.get(rule, 'sd3')}" for rule in RULES]


@pytest.mark.parametrize("name", PRESETS)
def test_a_key_is_a_line_with_its_value_and_default(name):
    settings = configs.load(name)
    assert models.path(settings.model)
    lines = legend.explained(settings)
    known = {key.name: key for key in (*legend.every(), *legend.rule_keys(settings.rule["name"]))}
    section, seen = "", set()
    for line in lines:
        key, _, rest = line.strip().partition(":")
        if not rest:
            section = key
            continue
        whole = f"{section}.{key}" if line.startswith(" ") else key
        seen.add(whole)
        given, default = rest.partition("  # ")[0].strip(), known[whole].default
        changed = default is not legend.NONE and legend.written(default) != given
        assert ("; default " in line) == changed, line
        assert not changed or line.endswith(f"; default {legend.written(default)}]"), line
        assert len(line) <= LONGEST or key in WIDER or changed, line
    assert {key for key in known if key.count(".") < 2} == seen


@pytest.mark.parametrize(
    ("of", "said"),
    [
        ({"type": "integer", "minimum": 1}, "whole, >= 1"),
        ({"type": "integer", "minimum": 1, "maximum": 100_000}, "whole 1 to 100,000"),
        ({"type": "number", "minimum": 0, "exclusiveMaximum": 1}, "0 to < 1"),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 10.0}, "> 0, to 10"),
        ({"type": "integer", "minimum": 0, "exclusiveMaximum": 2**63}, "whole 0 to < 2^63"),
        ({"type": "number"}, "number"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "text or null"),
        ({"type": "array", "items": {"type": "string"}, "minItems": 1}, "list of words, at least one"),
        ({"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2}, "[whole, whole]"),
        ({"type": "object", "additionalProperties": {"type": "number"}}, "name: number"),
        ({"type": "boolean"}, "true, false"),
        ({"type": "string", "pattern": "x", "allowed": "x alone"}, "x alone"),
    ],
)
def test_what_is_allowed_in_words(of, said):
    assert legend.allowed(of) == said


def test_no_key_is_without_words():
    for key in (*legend.every(), *(key for name in RULES for key in legend.rule_keys(name))):
        assert key.what, key.name
        assert key.allowed not in ("", "any"), key.name
