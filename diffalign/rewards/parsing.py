"""What a Python file says, without importing it."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any


def literal(body: list[ast.stmt], name: str) -> Any:
    """The value a module assigns to a name, None if it does not or it is not a literal."""
    for node in body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            try:
                return ast.literal_eval(node.value)
            except ValueError:
                return None
    return None


def parsed(path: Path) -> list[ast.stmt]:
    """The statements of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path)).body


def defined(body: list[ast.stmt]) -> set[str]:
    """The names that a module binds: functions, classes, what is assigned or imported, under conditions too; `*` if it may be others."""
    names: set[str] = set()
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        else:
            for field in ("body", "orelse", "finalbody", "handlers", "cases"):
                inner = getattr(node, field, [])
                names |= defined([part for part in inner if isinstance(part, ast.stmt)])
                names |= {
                    n
                    for part in inner
                    if isinstance(part, (ast.ExceptHandler, ast.match_case))
                    for n in defined(part.body)
                }
            stored = (part for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store))
            names |= {part.id for part in stored}
    return names
