"""What models are called: by their folders, and by people."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from diffalign.runtime import numbered
from diffalign.sampling import sources


def labels(models: Sequence[sources.Source]) -> dict[str, sources.Source]:
    """A folder name for each model: its own name, or its last adapter's run."""
    named = {}
    for number, model in enumerate(models):
        folder = model.adapters[-1].folder if model.adapters else None
        name = model.model if folder is None else run_of(folder)
        named[f"{number}-{re.sub(r'[^A-Za-z0-9._-]+', '-', Path(name).name)}"] = model
    return named


def names(models: Sequence[sources.Source]) -> list[str]:
    """What a page calls each model: a base by its own name, one with adapters by their runs; alike ones with a number."""
    found = []
    for model in models:
        runs = [f"{_short(run_of(a.folder))}{f' at {a.strength:g}' if a.strength != 1 else ''}" for a in model.adapters]
        found.append(" + ".join(runs) or f"{_short(model.model)}, the base")
    return [name if found.count(name) == 1 else f"{name} ({k})" for k, name in enumerate(found)]


def run_of(folder: Path) -> str:
    """What an adapter is called: its run, or RUN-130 for a checkpoint."""
    if folder.parent.name == "checkpoints" and (update := numbered.number(folder.name)) is not None:
        return f"{folder.parent.parent.name}-{update}"
    return str(folder.parent if folder.name in ("adapter", "best") else folder)


def _short(place: str) -> str:
    """The end of a path, which tells it from others of a kind."""
    return "/".join(Path(place).parts[-2:])
