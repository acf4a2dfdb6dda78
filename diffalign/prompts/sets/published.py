"""Published prompt sets, from the user's copy laid out as published. But for Pick-a-Pic they have no splits: not to be trained on."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffalign.runtime import json_text
from diffalign.runtime.extras import PARTS

Entry = dict[str, Any]
STYLES = ("anime", "concept-art", "paintings", "photo")  # of HPDv2's benchmark, a file each
LAYOUTS = {
    "drawbench": "a CSV file with the columns Prompts and Category",
    "partiprompts": "a TSV file with the columns Prompt and Category",
    "hpdv2": f"a folder with {', '.join(f'{style}.json' for style in STYLES)}, each a list of prompts",
    "geneval": "GenEval's evaluation_metadata.jsonl, 553 objects with prompt, tag and include",
    "pickapic": "Pick-a-Pic's folder, data/train-*.parquet, validation_unique-*.parquet and test_unique-*.parquet with the column caption",
}
# sha256 of prompts/evaluation_metadata.jsonl of GenEval's repository: what its generator writes with its seed 43, and what others report.
GENEVAL = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"


def drawbench(place: Path) -> list[Entry]:
    """Imagen's 200 prompts; `tag` is the category."""
    return _table(place, "Prompts")


def partiprompts(place: Path) -> list[Entry]:
    """Parti's 1,632 prompts; `tag` is the category."""
    # Tabs part its columns; a quotation mark is part of a prompt.
    return _table(place, "Prompt", delimiter="\t", quoting=csv.QUOTE_NONE)


def _table(place: Path, column: str, **format_of: Any) -> list[Entry]:
    with place.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file, strict=True, **format_of))
    if not rows:
        raise ValueError("it has no prompt")
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values() or not row[column].strip():
            raise ValueError(f"row {number} has no prompt and category, or more than the header")
    return [{"prompt": row[column].strip(), "tag": row["Category"]} for row in rows]


def hpdv2(place: Path) -> list[Entry]:
    """HPSv2's benchmark, 800 prompts for each of four styles; `tag` is the style."""
    entries = []
    for style in STYLES:
        texts = json_text.parse((place / f"{style}.json").read_bytes())
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{style}.json is no list of texts")
        entries += [{"prompt": text, "tag": style} for text in texts]
    return entries


def geneval(place: Path) -> list[Entry]:
    """GenEval's 553 prompts, from its own file and no other."""
    content = place.read_bytes().replace(b"\r\n", b"\n")
    if (digest := hashlib.sha256(content).hexdigest()) != GENEVAL:
        raise ValueError(
            f"its sha256 is {digest[:12]}..., GenEval's is {GENEVAL[:12]}...; other prompts go by their .jsonl file"
        )
    return [json_text.parse(line) for line in content.decode().split("\n") if line]


def pickapic(place: Path, split: str) -> list[Entry]:
    """Pick-a-Pic's captions (arXiv 2305.01569), each once, in the order of the files; people wrote them, and some are not safe for work.

    Raises:
        ImportError: without pyarrow.
    """
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f"it is read with pyarrow; {PARTS['pyarrow'].install}") from error
    name = {"train": "train"}.get(split, f"{split}_unique")
    files = sorted(path for folder in (place, place / "data") for path in folder.glob(f"{name}-*.parquet"))
    if not files:
        raise ValueError(f"it has no {name}-*.parquet")
    captions = [text for path in files for text in parquet.read_table(path, columns=["caption"])["caption"].to_pylist()]
    return [{"prompt": text} for text in dict.fromkeys(str(text).strip() for text in captions if text) if text]


# name -> place -> entries
READERS: dict[str, Callable[[Path], list[Entry]]] = {
    "drawbench": drawbench,
    "partiprompts": partiprompts,
    "hpdv2": hpdv2,
    "geneval": geneval,
}
# name -> (place, split) -> entries
SPLIT_READERS: dict[str, Callable[[Path, str], list[Entry]]] = {"pickapic": pickapic}
NAMES = (*READERS, *SPLIT_READERS)
