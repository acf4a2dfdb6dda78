"""Published prompt sets, from the user's copy laid out as published, or fetched by the user's own command; none is shipped. But for
Pick-a-Pic they have no splits: not to be trained on."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.runtime import json_text
from diffalign.runtime.extras import PARTS

Entry = dict[str, Any]
STYLES = ("anime", "concept-art", "paintings", "photo")  # of HPDv2's benchmark, a file each
CATEGORIES = (
    "color",
    "shape",
    "texture",
    "spatial",
    "3d_spatial",
    "numeracy",
    "non_spatial",
    "complex",
)  # of T2I-CompBench
# sha256 of prompts/evaluation_metadata.jsonl of GenEval's repository: what its generator writes with its seed 43, and what others report.
GENEVAL = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"


def drawbench(place: Path) -> list[Entry]:
    """Imagen's 200 prompts; `tag` is the category."""
    return _table(place, "Prompts")


def partiprompts(place: Path) -> list[Entry]:
    """Parti's 1,632 prompts; `tag` is the category, `challenge` what is hard about one, where the file says it."""
    # Tabs part its columns; a quotation mark is part of a prompt.
    return _table(place, "Prompt", {"challenge": "Challenge"}, delimiter="\t", quoting=csv.QUOTE_NONE)


def _table(place: Path, column: str, more: dict[str, str] | None = None, **format_of: Any) -> list[Entry]:
    with place.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file, strict=True, **format_of))
    if not rows:
        raise ValueError("it has no prompt")
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values() or not row[column].strip():
            raise ValueError(f"row {number} has no prompt and category, or more than the header")
    named = {"tag": "Category", **{key: head for key, head in (more or {}).items() if head in rows[0]}}
    return [{"prompt": row[column].strip(), **{key: row[head] for key, head in named.items()}} for row in rows]


def hpdv2(place: Path) -> list[Entry]:
    """HPSv2's benchmark, 800 prompts for each of four styles; `tag` is the style."""
    entries = []
    for style in STYLES:
        texts = json_text.parse((place / f"{style}.json").read_bytes())
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{style}.json is no list of texts")
        entries += [{"prompt": text, "tag": style} for text in texts]
    return entries


def hpdv3(place: Path) -> list[Entry]:
    """HPSv3's benchmark, twelve categories, a file each; `tag` is the category. Its layout is known from the names of its files alone: a
    text is an entry itself, or its `prompt`, or its `caption`."""
    files = sorted(place.glob("benchmark_*.json")) or sorted(place.glob("benchmark/benchmark_*.json"))
    if not files:
        raise ValueError("it has no benchmark_*.json")
    entries = []
    for file in files:
        listed = json_text.parse(file.read_bytes())
        texts = [_text(entry) for entry in listed] if isinstance(listed, list) else [None]
        if not texts or None in texts:
            raise ValueError(f"{file.name} is no list of texts, or of objects with a prompt or a caption")
        entries += [{"prompt": text, "tag": file.stem.removeprefix("benchmark_")} for text in texts]
    return entries


def _text(entry: Any) -> str | None:
    found = entry.get("prompt", entry.get("caption")) if isinstance(entry, dict) else entry
    return found.strip() if isinstance(found, str) and found.strip() else None


def geneval2(place: Path) -> list[Entry]:
    """GenEval 2's 800 prompts (arXiv 2512.16853); `questions` are its `vqa_list` with the answers and `skills`, in the form that
    soft_tifa asks, and `tag` how many atoms a prompt has."""
    entries = [json_text.parse(line) for line in place.read_text(encoding="utf-8").split("\n") if line.strip()]
    for number, entry in enumerate(entries, 1):
        whole = isinstance(entry, dict) and isinstance(entry.get("prompt"), str) and "atom_count" in entry
        if not whole or not isinstance(entry.get("vqa_list"), list):
            raise ValueError(f"line {number} is no object with prompt, atom_count and vqa_list")
        skills = entry.get("skills")
        pairs = all(isinstance(pair, list) and len(pair) == 2 for pair in entry["vqa_list"])
        if not pairs or not isinstance(skills, list) or len(skills) != len(entry["vqa_list"]):
            raise ValueError(
                f"line {number}: vqa_list is no list of questions with answers, or skills has not one for each"
            )
    if not entries:
        raise ValueError("it has no prompt")
    return [{**entry, "questions": _asked(entry), "tag": f"{entry['atom_count']} atoms"} for entry in entries]


def _asked(entry: Entry) -> list[Entry]:
    pairs = zip(entry["vqa_list"], entry["skills"], strict=True)
    return [{"question": question, "answer": answer, "skill": skill} for (question, answer), skill in pairs]


def dpg(place: Path) -> list[Entry]:
    """DPG-Bench's 1,065 dense prompts (ELLA, arXiv 2403.05135); `scene_graph` are a prompt's yes-no questions, each with the places of
    those that it hangs on, and `tag` is the collection that a prompt is of. The table is known from the published code that reads it: a
    row a question, whose `proposition_id` others name in `dependency`, 0 for none."""
    rows: dict[str, list[dict[str, str]]] = {}
    with (place / "dpg_bench.csv").open(encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file, strict=True):
            rows.setdefault(row["item_id"], []).append(row)
    if not rows:
        raise ValueError("dpg_bench.csv has no question")
    return [
        {
            "prompt": (place / "prompts" / f"{name}.txt").read_text(encoding="utf-8").strip(),
            "tag": name.rstrip("0123456789") or "numbered",
            "scene_graph": _graph(name, own),
        }
        for name, own in rows.items()
    ]


def _graph(name: str, rows: list[dict[str, str]]) -> list[Entry]:
    """A prompt's questions, with the places in this list, from 0, of those that each hangs on."""
    try:
        ids = [int(row["proposition_id"]) for row in rows]
        hang = [[int(parent) for parent in row["dependency"].split(",")] for row in rows]
        parents = [[ids.index(parent) for parent in own if parent != 0] for own in hang]
    except (ValueError, TypeError, AttributeError) as error:  # a short row has None
        raise ValueError(f"dpg_bench.csv: {name} has a proposition_id or dependency that is none of its own") from error
    if len(set(ids)) < len(ids):
        raise ValueError(f"dpg_bench.csv: {name} has two rows of one proposition_id")
    texts = [row["question_natural_language"] for row in rows]
    return [{"question": text, "parents": own} for text, own in zip(texts, parents, strict=True)]


def compbench(place: Path) -> list[Entry]:
    """T2I-CompBench++'s validation prompts (arXiv 2307.06350), 300 of each of eight categories; `tag` is the category."""
    entries = []
    for name in CATEGORIES:
        lines = (place / f"{name}_val.txt").read_text(encoding="utf-8").split("\n")
        if not any(map(str.strip, lines)):
            raise ValueError(f"{name}_val.txt has no prompt")
        entries += [{"prompt": line.strip(), "tag": name} for line in lines if line.strip()]
    return entries


def written(place: Path) -> list[Entry]:
    """A prompt a line, each with the text to be written in quotation marks, as Flow-GRPO's are."""
    texts = [line.strip() for line in place.read_text(encoding="utf-8").split("\n") if line.strip()]
    if not texts or (bare := [text for text in texts if text.count('"') < 2]):
        raise ValueError(f'got {bare[0]!r}, without a text in "quotation marks"' if texts else "it has no prompt")
    return [{"prompt": text} for text in texts]


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


@dataclass(frozen=True)
class Published:
    """A published set: `layout` in words, how its copy at a place is read (`splits`: with the split's name), its licence, where it is
    published (a file that can be fetched if `digest`, its sha256 with line ends \\n, is known, and it is no folder of `files`), and that
    digest."""

    layout: str
    read: Callable[..., list[Entry]]
    licence: str = ""
    url: str = ""
    digest: str = ""
    splits: bool = False
    files: tuple[str, ...] = ()

    def digest_at(self, place: Path) -> str:
        """The sha256 of a copy: of a file, or of a folder's `files`, or else its .json files, one after another, with line ends \\n."""
        named: Iterable[Path] = [path for name in self.files for path in sorted(place.glob(name))]
        files: Iterable[Path] = [place] if place.is_file() else named if self.files else sorted(place.rglob("*.json"))
        return hashlib.sha256(b"".join(file.read_bytes().replace(b"\r\n", b"\n") for file in files)).hexdigest()


RAW = "https://raw.githubusercontent.com/"
PUBLISHED: dict[str, Published] = {
    "drawbench": Published(
        "a CSV file with the columns Prompts and Category",
        drawbench,
        "none is stated",
        "https://imagen.research.google",
    ),
    "partiprompts": Published(
        "a TSV file with the columns Prompt and Category",
        partiprompts,
        "Apache-2.0",
        f"{RAW}google-research/parti/5a657978134374ce28973948331b319adef164bd/PartiPrompts.tsv",
        "fab29e41bb512a169b56acab4cf2a41dcb675e285df2efcde6640c7dd3c440eb",
    ),
    "hpdv2": Published(
        f"a folder with {', '.join(f'{style}.json' for style in STYLES)}, each a list of prompts",
        hpdv2,
        "Apache-2.0",
        "https://huggingface.co/datasets/zhwang/HPDv2/tree/main/benchmark",
    ),
    "hpdv3": Published(
        "a folder with benchmark_*.json, each a list of prompts",
        hpdv3,
        "MIT",
        "https://huggingface.co/datasets/MizzenAI/HPDv3/tree/main/benchmark",
    ),
    "geneval": Published(
        "GenEval's evaluation_metadata.jsonl, 553 objects with prompt, tag and include", geneval, "MIT", "", GENEVAL
    ),
    "geneval2": Published(
        "GenEval 2's geneval2_data.jsonl, objects with prompt, atom_count and vqa_list",
        geneval2,
        "CC BY-NC 4.0: not for commercial use",
        f"{RAW}facebookresearch/GenEval2/a6e82d2289e8d418f27f0adee77908b07060eea3/geneval2_data.jsonl",
        "09233adbc9f877fba205f1a20efa4a8640e7e62a91dfd55893562bed8a928e43",
    ),
    "dpg": Published(
        "the folder dpg_bench with dpg_bench.csv and prompts/*.txt",
        dpg,
        "Apache-2.0",
        "https://github.com/TencentQQGYLab/ELLA/tree/3c228f1dc6c4d3cad0a47493816151a419f14db3/dpg_bench",
        files=("dpg_bench.csv", "prompts/*.txt"),
    ),
    "compbench": Published(
        f"the folder examples/dataset with {', '.join(f'{name}_val.txt' for name in CATEGORIES)}",
        compbench,
        "MIT",
        "https://github.com/Karine-Huang/T2I-CompBench/tree/1b7094991a57f3c22abdd4f6e8ba6c1a15517073/examples/dataset",
        "d5227a72f4dba96ea58d01c9d0b4e6772c5612854519e90375e9d2e8951db429",
        files=tuple(f"{name}_val.txt" for name in CATEGORIES),
    ),
    "ocr-prompts": Published(
        "a text file, a prompt a line with the wanted text in quotation marks",
        written,
        "MIT",
        "https://github.com/yifan123/flow_grpo/tree/main/dataset/ocr",
    ),
    "pickapic": Published(
        "Pick-a-Pic's folder, data/train-*.parquet, validation_unique-*.parquet and test_unique-*.parquet with the column caption",
        pickapic,
        "MIT",
        splits=True,
    ),
}
