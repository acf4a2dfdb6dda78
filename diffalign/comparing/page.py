"""The page of a comparison, `index.html`: one file that asks for nothing from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffalign import config as configs
from diffalign.comparing import tuned, wording
from diffalign.comparing.curves import Curve, curve
from diffalign.comparing.results import Pair, Results
from diffalign.comparing.units import Found
from diffalign.report import charts, pages, pictures
from diffalign.runs.grids import stored
from diffalign.runtime import numbered
from diffalign.runtime.files import write_text

PAGE = Path(__file__).parent / "page.html"
AXES = {"updates": "updates", "rows": "network rows", "reward_calls": "reward calls", "seconds": "seconds of training"}
SHOWN, TIMES = 6, 8  # pictures of a model, moments of training


def write(results: Results, place: Path) -> None:
    """Write it.

    Raises:
        Fault: if a unit's samples are damaged.
    """
    values = {
        "finding": wording.finding(results),
        "results": results,
        "wording": wording,
        "budget": "{:,.10g} {}".format(*_named(results)),
        "seeds": wording.seeds_said(results),
        "curves": {kind: _curves(results, kind) for kind in AXES},
        "axes": AXES,
        "forests": [(judge, svg) for judge in results.judges if (svg := _forest(results, judge))],
        "pictures": _pictures(results),
        "settings": _settings(results),
        "shared": _shared(results),
        "units": {method.label: _links(method.found, place) for method in results.methods},
        "left_out": wording.left_out(results),
        "tuning": tuned.said(results.comparison.methods),
        "tried": tuned.table(results.comparison.methods),
    }
    write_text(place / "index.html", pages.render(PAGE, {"interval": wording.interval}, **values))


def _links(found: Sequence[Found], place: Path) -> list[tuple[int, str]]:
    """Seeds, and where the pages of their runs are from a comparison's folder; empty where there is none."""
    pages_of = [(each.unit.seed, each.unit.place / "index.html") for each in found]
    return [(seed, path.relative_to(place).as_posix() if path.is_file() else "") for seed, path in pages_of]


def _named(results: Results) -> tuple[float, str]:
    kind, limit = results.comparison.asked.budget
    return limit, AXES[kind]


def _curves(results: Results, kind: str) -> list[dict[str, Any]]:
    """A chart and its numbers for every judge."""
    found = []
    for judge in results.judges:
        own = [(k, curve(m, judge, kind)) for k, m in enumerate(results.methods) if m.found]
        parts = [_line(each, k) for k, each in own if each.x]
        if parts:
            title = f"{judge} against {AXES[kind]}, a line a method"
            rows = [(part.label, note) for part in parts for note in part.notes]
            found.append({"judge": judge, "svg": charts.lines(parts, title, AXES[kind]), "rows": rows})
    return found


def _line(found: Curve, number: int) -> charts.Line:
    notes = []
    for k, updates in enumerate(found.updates):
        over = f", {found.low[k]:.3f} to {found.high[k]:.3f} over {wording.seeds(found.seeds)}"
        notes.append(
            f"{found.y[k]:.3f} after {updates} updates, at {wording.number(found.x[k])}{over if found.seeds > 1 else ''}"
        )
    return charts.Line(found.label, found.x, found.y, found.low, found.high, notes, number)


def _forest(results: Results, judge: str) -> str:
    """The differences of all pairs, empty where there is none."""
    bars = [_bar(pair) for pair in results.pairs if pair.judge == judge and not pair.reason]
    over = "prompts" if any(pair.prompts for pair in results.pairs) else "seeds"
    below = f"difference on {judge}, 95 % interval over {over}"
    return charts.forest(bars, f"{below}; numbers below", below) if bars else ""


def _bar(pair: Pair) -> charts.Bar:
    shown = pair.prompts or pair.difference.value
    return charts.Bar(f"{pair.first} - {pair.second}", shown.value, shown.low, shown.high, pair.resolved)


# -- pictures


def _pictures(results: Results) -> dict[str, Any]:
    """The base model's and every method's samples of the same prompts and noises, at several moments; of each the first seed."""
    first = {method.label: method.found[0] for method in results.methods if method.found}
    files = {label: numbered.files(each.unit.place / "samples", ".npz") for label, each in first.items()}
    files = {label: own for label, own in files.items() if own}
    same = {first[label].asked for label in files}
    if not files or len(same) > 1:
        return {}
    every = sorted(set().union(*files.values()))
    moments = [every[k] for k in pictures.spread(len(every), TIMES)]
    prompts = _prompts(next(iter(first.values())), files)
    rows: list[dict[str, Any]] = []
    base = next((own for own in files.values() if 0 in own), None)
    if base is not None:
        rows.append({"label": "base", "seed": None, "cells": {0: _cells(base[0])}})
    for label, own in files.items():
        # At each moment what the method's newest samples are.
        newest = {moment: max((k for k in own if k <= moment), default=None) for moment in moments}
        cells = {k: _cells(own[k]) for k in {k for k in newest.values() if k is not None}}
        rows.append({"label": label, "seed": first[label].unit.seed, "cells": cells, "newest": newest})
    return {"moments": moments, "prompts": prompts, "rows": rows}


def _prompts(found: Found, files: dict[str, dict[int, Path]]) -> list[str]:
    """Of the pictures that are shown."""
    texts = json.loads(found.asked)[1] or []
    count = len(stored(next(iter(next(iter(files.values())).values()))))
    return [texts[k] for k in pictures.spread(len(texts), count)][:SHOWN]


def _cells(path: Path) -> list[str]:
    """Pictures as addresses that hold them: small ones as they are, larger ones made smaller."""
    return [pictures.address(image) for image in stored(path)[:SHOWN]]


# -- settings


def _flat(results: Results) -> list[dict[str, Any]]:
    """Each method's settings by dotted keys."""
    return [dict(configs.flat(method.method.settings)) for method in results.methods]


def _settings(results: Results) -> list[tuple[str, list[str]]]:
    """Keys that methods differ in, and what each has."""
    flat = _flat(results)
    keys = dict.fromkeys(key for own in flat for key in own)
    rows = [(key, [own.get(key, _NOT) for own in flat]) for key in keys]
    return [(key, [_said(value) for value in values]) for key, values in rows if any(v != values[0] for v in values)]


def _shared(results: Results) -> list[tuple[str, str]]:
    """Keys that all have alike."""
    flat = _flat(results)
    return [(key, _said(value)) for key, value in flat[0].items() if all(own.get(key, _NOT) == value for own in flat)]


_NOT = object()  # of a key that a method's rule does not have


def _said(value: Any) -> str:
    return "" if value is _NOT else json.dumps(value, ensure_ascii=False)
