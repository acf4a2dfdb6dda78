"""YAML as the user writes it, to plain data: the core of YAML 1.2, and nothing in it that is not plain data."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from diffalign.errors import UserError, shortened

LONGEST = 2**20  # characters of a file
DEEPEST = 20  # levels of lists and sections in one another
MOST = 100_000  # values, each alias counted as what it stands for
DIGITS = 40  # of a number

_CORE = "tag:yaml.org,2002:"
_KINDS = {_CORE + kind for kind in ("map", "seq", "str", "int", "float", "bool", "null", "merge")}


class _Loader(yaml.SafeLoader):
    """Words are words: `yes`, `1:30` and dates are text, and 1e-4 is a number."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        if re.search("[\0\ud800-\udfff]", value):
            raise _Refused(node, "a NUL or half a character")
        return value

    def construct_int(self, node: Any) -> int:
        text = self.construct_scalar(node)
        return int(text, 16 if "x" in text else 8 if "o" in text else 10)


_Loader.add_constructor(_CORE + "int", _Loader.construct_int)
for _kind, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+0123456789."),
    ("merge", r"<<", "<"),
):  # fmt: skip
    _Loader.add_implicit_resolver(_CORE + _kind, re.compile(f"({_pattern})\\Z", re.ASCII), list(_first))


class _Refused(Exception):
    def __init__(self, node: Node, why: str) -> None:
        super().__init__(why)
        self.line = node.start_mark.line + 1


def parse(text: str, where: str) -> Any:
    """Plain data: None, bool, int, float, str, lists, and dicts of them; `where` is what to call the text in messages.

    Raises:
        UserError: one line with `where` and the line, if it is no YAML, gives a key twice, has tags, or is beyond the limits above.
    """
    if len(text) > LONGEST:
        raise UserError(f"{where}: {len(text)} characters, allowed are {LONGEST}")
    line = 0
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count(node, {}, 0)
            return loader.construct_document(node)
        finally:
            loader.dispose()  # type: ignore[no-untyped-call]
    except _Refused as error:
        line, why = error.line, str(error)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line = mark.line + 1 if mark else 0
        why = f"not YAML ({shortened(str(getattr(error, 'problem', None) or error))})"
    except RecursionError:
        why = f"more than {DEEPEST} levels"
    except (ValueError, TypeError) as error:
        why = f"not YAML ({shortened(str(error))})"
    raise UserError(f"{where}{f' line {line}' if line else ''}: {why}")


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would take for something else than text."""


for _first, _found in _Loader.yaml_implicit_resolvers.items():
    for _tag, _found_pattern in _found:
        _Dumper.add_implicit_resolver(_tag, _found_pattern, [_first])  # type: ignore[no-untyped-call]


def dump(data: Any) -> str:
    """Plain data as YAML that `parse` reads as the same."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def flow(data: Any) -> str:
    """Plain data as YAML on one line."""
    text = yaml.dump(data, Dumper=_Dumper, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**9)
    return text.removesuffix("...\n").strip()


def _count(node: Node, known: dict[Node, tuple[int, int]], level: int) -> tuple[int, int]:
    """How many values and levels a node stands for, aliases followed; refuses what is not plain data on the way."""
    if level > DEEPEST:
        raise _Refused(node, f"more than {DEEPEST} levels")
    if node in known:
        count, levels = known[node]
        if level + levels > DEEPEST:
            raise _Refused(node, "more levels than allowed, or a value within itself")
        return count, levels
    if node.tag not in _KINDS:
        raise _Refused(node, f"tag {shortened(node.tag.replace(_CORE, '!!'))}, allowed are values without tags")
    known[node] = (1, DEEPEST + 1)  # until it is known: a value within itself is found by this
    inside: list[Node] = []
    if isinstance(node, MappingNode):
        _check_keys(node)
        inside = [part for pair in node.value for part in pair]
    elif isinstance(node, SequenceNode):
        inside = node.value
    elif isinstance(node, ScalarNode) and node.tag == _CORE + "int" and len(node.value) > DIGITS:
        raise _Refused(node, f"a number of {len(node.value)} digits, allowed are {DIGITS}")
    counts = [_count(part, known, level + 1) for part in inside]
    known[node] = (1 + sum(c for c, _ in counts), 1 + max((d for _, d in counts), default=0))
    if known[node][0] > MOST:
        raise _Refused(node, f"more than {MOST} values")
    return known[node]


def _check_keys(node: MappingNode) -> None:
    seen: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, ScalarNode):
            raise _Refused(key, "a key that is no word")
        if key.value in seen and key.tag != _CORE + "merge":
            raise _Refused(key, f"{shortened(key.value)} is given twice, first in line {seen[key.value]}")
        seen[key.value] = key.start_mark.line + 1
