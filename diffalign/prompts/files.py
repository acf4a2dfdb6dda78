"""Where prompts come from: a set by name, or a file. Needs no torch.

A file is text, one prompt a line, or JSON lines of objects with a `prompt` and whatever metadata a reward needs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from diffalign.errors import UserError
from diffalign.prompts import sets as prompt_sets
from diffalign.prompts.sets import Entry as Entry
from diffalign.runtime.files import is_file


def read(source: str, tasks: Sequence[str], split: str, field: str = "prompts.source") -> list[Entry]:
    """Prompt entries, each with at least `prompt`; `field` is what the user set, for messages.

    Raises:
        UserError: naming the file and every broken line.
    """
    named = prompt_sets.find(source, tasks, split, field)
    if named is not None:
        return named
    path = Path(source)
    if not is_file(path):
        what = "is a folder" if path.is_dir() else "is no file"
        raise UserError(
            f"{field}: {source!r} {what}; allowed are {', '.join(prompt_sets.SETS)}, "
            f"a .txt or .jsonl file, NAME@PLACE of {', '.join(prompt_sets.published.NAMES)}"
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # some editors begin a file with a mark
    except UnicodeDecodeError as error:
        raise UserError(f"{field}: {source} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    entries, problems = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            entries.append({"prompt": line.strip()})
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.append(f"{field}: {source} line {number}: not JSON ({error})")
            continue
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            problems.append(f"{field}: {source} line {number}: expected an object with a string 'prompt'")
            continue
        entries.append(entry)
    if not entries and not problems:
        problems.append(f"{field}: {source} holds no prompt")
    if problems:
        raise UserError(*problems)
    return entries
