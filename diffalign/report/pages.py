"""Pages: one file each that needs nothing from elsewhere, on one base with styles for light and dark, desktop, phone and paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

BASE = Path(__file__).parent / "base.html"
SHARED = (BASE, *sorted(BASE.parent.glob("*.js")))  # what templates extend and include


def render(template: Path, filters: Mapping[str, Callable[..., Any]] | None = None, **values: Any) -> str:
    """A template that extends `base.html`, and may include the scripts beside it, filled; what is text is escaped."""
    from jinja2 import DictLoader, Environment

    texts = {path.name: path.read_text(encoding="utf-8") for path in (*SHARED, template)}
    engine = Environment(autoescape=True, loader=DictLoader(texts))
    engine.filters.update(filters or {})
    return engine.get_template(template.name).render(**values)
