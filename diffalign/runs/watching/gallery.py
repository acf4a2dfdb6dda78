"""Runs under a folder, and the page that lists them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from diffalign.errors import UserError
from diffalign.report import charts, pages, pictures
from diffalign.runs.watching import live
from diffalign.runs.watching.reading import Record, is_run
from diffalign.runtime import keys

LIST = Path(__file__).parent / "list.html"
DEEP, MOST = 4, 1000  # folders below the one that is asked for, and runs
SPARK = 80  # points of a run's line


def runs(folder: Path) -> dict[str, Path]:
    """Runs in a folder by their path from it, `.` for the folder itself; links to folders are not followed."""
    found = sorted(_runs(folder, DEEP), key=lambda path: path.parts)
    return {path.relative_to(folder).as_posix(): path for path in found[:MOST]}


def _runs(folder: Path, deep: int) -> Iterator[Path]:
    if is_run(folder):
        yield folder
        return
    try:
        inside = [Path(entry) for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
    except OSError:  # it may not be read, or is gone since
        return
    for path in inside:
        if deep and not path.name.startswith("."):
            yield from _runs(path, deep - 1)


def row(name: str, record: Record | UserError) -> dict[str, Any]:
    """A run in the list; of one whose config is damaged, that."""
    address = f"run/{quote(name)}/"
    if isinstance(record, UserError):
        return {"name": name, "address": address, "state": str(record), "alarms": []}
    total, reward = record.total, record.last_reward
    values = [each[keys.TOTAL] for each in record.updates if keys.TOTAL in each]
    return {
        "name": name,
        "address": address,
        "what": record.name,
        "state": live.state(record),
        "done": f"{record.done} of {total}" if total is not None else str(record.done),
        "share": record.done / total if total else 0.0,
        "reward": "" if reward is None else f"{reward:.3f}",
        "spark": charts.spark([values[k] for k in pictures.spread(len(values), SPARK)]),
        "left": record.left.partition(", ")[2].removesuffix(" left"),
        "alarms": record.alarms,
    }


def render(title: str, rows: list[dict[str, Any]], version: str, report: bool) -> str:
    """The list; report: whether there is a comparison's page to lead to."""
    running = sum(each["state"] == "running" for each in rows)
    alarmed = sum(bool(each["alarms"]) for each in rows)
    finding = f"{len(rows)} run{'s' if len(rows) != 1 else ''}, {running} running"
    if alarmed:
        finding += f", {alarmed} with alarms"
    return pages.render(LIST, title=title, rows=rows, version=version, report=report, finding=finding)
