"""What the program says when it ends early, found in its source, for docs/messages.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from diffalign.errors import EXIT_CODES
from tools.docs.markdown import table

ROOT = Path(__file__).parents[2]
FAULTS = {"Fault", "Unscored", "RewardFailed", "CardFailed"}
SHORTEST = 12  # characters of a message that can be looked for


def exit_codes() -> list[str]:
    """What a command ends with."""
    return table(("code", "meaning"), ((str(code), said) for code, said in EXIT_CODES.items()))


def faults() -> list[str]:
    """What ends a run from outside."""
    return _listed(text for text in _all() if text[0])


def mistakes() -> list[str]:
    """What is refused of the user's input."""
    return _listed(text for text in _all() if not text[0])


def is_said(line: str) -> bool:
    """Whether the source has a text that is this line, … standing for whatever differs."""
    return any(_same(line, text) for text in _everything())


@cache
def _everything() -> tuple[str, ...]:
    found: list[str] = []
    for path in sorted((ROOT / "diffalign").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            found += [" ".join(text.split()) for text in _texts(node)]
    return tuple(found)


def _same(line: str, text: str) -> bool:
    """A quoted line's words in a text's, in order, the first at its beginning."""
    at, words = 0, [part.strip() for part in line.split("…")]
    for number, part in enumerate(words):
        at = text.find(part, at)
        if at < 0 or (number == 0 and part and at > 0 and text[:at].strip("…: ")):
            return False
        at += len(part)
    return True


def _listed(found: Iterator[tuple[bool, str, str]]) -> list[str]:
    said: dict[str, list[str]] = {}
    for _, text, place in found:
        said.setdefault(text, []).append(place)
    rows = (
        (" ".join(f"`{place}`" for place in dict.fromkeys(where)), f"`` {text} ``" if "`" in text else f"`{text}`")
        for text, where in said.items()
    )
    return table(("said by", "message"), rows)


def _all() -> Iterator[tuple[bool, str, str]]:
    """Whether it is a fault, its words with … for what differs, and its file."""
    for path in sorted((*(ROOT / "diffalign").rglob("*.py"), *(ROOT / "reward_models").glob("*.py"))):
        place = str(path.relative_to(ROOT)).removeprefix("diffalign/")
        found = [(node.lineno, *each) for node in ast.walk(ast.parse(path.read_text())) for each in _said(node)]
        yield from ((fault, text, place) for _, fault, text in sorted(found))


def _said(node: ast.AST) -> Iterator[tuple[bool, str]]:
    """The messages of an exception that is made, and of a problem that is added to a list."""
    if not isinstance(node, ast.Call):
        return
    name = node.func.id if isinstance(node.func, ast.Name) else ""
    adds = isinstance(node.func, ast.Attribute) and node.func.attr == "append"
    if name in FAULTS or name == "UserError" or adds:
        for argument in node.args:
            for text in _texts(argument):
                text = " ".join(text.split())
                if len(text.replace("…", "").strip()) >= SHORTEST and (not adds or ": got " in text):
                    yield name in FAULTS, text


def _texts(node: ast.AST) -> Iterator[str]:
    """An expression's text, with … for what it takes from elsewhere; of a choice, each way."""
    if isinstance(node, ast.IfExp):
        yield from _texts(node.body)
        yield from _texts(node.orelse)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        lefts, rights = list(_texts(node.left)) or ["…"], list(_texts(node.right)) or ["…"]
        yield from (left + right for left in lefts for right in rights)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
        yield "".join(map(str, parts))
