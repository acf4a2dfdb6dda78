"""Published prompt sets, from the user's copy laid out as published; they have no splits and are not to be trained on."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Entry = dict[str, Any]
STYLES = ("anime", "concept-art", "paintings", "photo")  # of HPDv2's benchmark, a file each
LAYOUTS = {
    "drawbench": "a CSV file with the columns Prompts and Category",
    "partiprompts": "a TSV file with the columns Prompt and Category",
    "hpdv2": f"a folder with {', '.join(f'{style}.json' for style in STYLES)}, each a list of prompts",
    "geneval": "GenEval's evaluation_metadata.jsonl, 553 objects with prompt, tag and include",
}
GENEVAL = {
    "single_object": 80,
    "two_object": 99,
    "counting": 80,
    "colors": 94,
    "position": 100,
    "color_attr": 100,
}  # prompts of the published file by task


def drawbench(place: Path) -> list[Entry]:
    """Imagen's 200 prompts; `tag` is the category."""
    return _table(place, ",", "Prompts")


def partiprompts(place: Path) -> list[Entry]:
    """Parti's 1,632 prompts; `tag` is the category."""
    return _table(place, "\t", "Prompt")


def _table(place: Path, delimiter: str, column: str) -> list[Entry]:
    with place.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter=delimiter))
    found = [{"prompt": row[column].strip(), "tag": row["Category"]} for row in rows if row[column].strip()]
    if not found:
        raise ValueError("it has no prompt")
    return found


def hpdv2(place: Path) -> list[Entry]:
    """HPSv2's benchmark, 800 prompts for each of four styles; `tag` is the style."""
    found = []
    for style in STYLES:
        texts = json.loads((place / f"{style}.json").read_text(encoding="utf-8"))
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{style}.json is no list of texts")
        found += [{"prompt": text, "tag": style} for text in texts]
    return found


def geneval(place: Path) -> list[Entry]:
    """GenEval's 553 prompts, checked against its published numbers by task."""
    entries = [json.loads(line) for line in place.read_text(encoding="utf-8").splitlines() if line.strip()]
    counts = dict.fromkeys(GENEVAL, 0)
    for entry in entries:
        if not isinstance(entry["prompt"], str) or not isinstance(entry["include"], list):
            raise ValueError("a line lacks prompt or include")
        counts[entry["tag"]] += 1
    if counts != GENEVAL:
        raise ValueError(f"it has {counts}, published are {GENEVAL}")
    return entries


READERS: dict[str, Callable[[Path], list[Entry]]] = {
    "drawbench": drawbench,
    "partiprompts": partiprompts,
    "hpdv2": hpdv2,
    "geneval": geneval,
}
