"""Where prompts come from: a set by name, or a file whose ending says what it is. Needs no torch."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from diffalign.errors import UserError, shown
from diffalign.prompts import sets as prompt_sets
from diffalign.prompts.sets import Entry as Entry
from diffalign.runtime import json_text
from diffalign.runtime.files import home, is_file, is_folder

BREAK = re.compile(r"\r\n|\n|\r")  # what ends a line; U+2028, a form feed and others are text


class Broken(ValueError):
    """A place in a file that cannot be read as what it should be; `line` 0: the whole file."""

    def __init__(self, line: int, why: str) -> None:
        super().__init__(why)
        self.line = line


def read(source: str, tasks: Sequence[str], split: str, field: str = "prompts.source") -> list[Entry]:
    """Prompt entries, each with at least `prompt`; `field` is what the user set, for messages.

    Raises:
        UserError: naming the file and every broken line.
    """
    named = prompt_sets.find(source, tasks, split, field)
    if named is not None:
        return named
    path = Path(home(source))
    if not is_file(path):
        what = "is a folder" if is_folder(path) else "is no file"
        raise UserError(
            f"{field}: {shown(source)} {what}; allowed are {', '.join(prompt_sets.SETS)}, "
            f"a file ({', '.join(READERS)}), NAME@PLACE of {', '.join(prompt_sets.published.PUBLISHED)}"
        )
    problems: list[str] = []
    entries: list[Entry] = []
    try:
        text = path.read_bytes().decode("utf-8-sig")  # some editors begin a file with a mark
        kind = "entry" if path.suffix.lower() == ".json" else "line"
        for place, entry in READERS.get(path.suffix.lower(), as_text)(text):
            if isinstance(entry, Broken):
                problems.append(f"{field}: {source} {kind} {place}: {entry}")
            else:
                entries.append(entry)
    except Broken as error:
        where = f"{source} line {error.line}" if error.line else source
        problems.append(f"{field}: {where}: {error}")
    except UnicodeDecodeError as error:
        problems.append(f"{field}: {source} is not UTF-8 text: {error.reason} at byte {error.start}")
    except OSError as error:
        problems.append(f"{field}: {source} cannot be read ({error.strerror})")
    if not entries and not problems:
        problems.append(f"{field}: {source} holds no prompt")
    if problems:
        raise UserError(*problems)
    return entries


Lines = Iterator[tuple[int, "Entry | Broken"]]


def as_text(text: str) -> Lines:
    """A prompt a line."""
    for number, line in enumerate(BREAK.split(text), 1):
        if line.strip():
            yield number, checked({"prompt": line.strip()})


def json_lines(text: str) -> Lines:
    """A line an object with a `prompt`, or a string."""
    for number, line in enumerate(text.split("\n"), 1):  # others than \n may stand within a string
        if line.strip():
            try:
                yield number, checked(json_text.parse(line))
            except ValueError as error:
                yield number, Broken(number, str(error))


def json_list(text: str) -> Lines:
    """A list of such objects or strings."""
    try:
        whole = json_text.parse(text)
    except ValueError as error:
        raise Broken(0, str(error)) from None
    if not isinstance(whole, list):
        raise Broken(0, f"got {shown(whole)}, expected a list of texts or of objects with a string 'prompt'")
    # Where an entry stands is not known: its number in the list.
    yield from ((number, checked(entry)) for number, entry in enumerate(whole, 1))


def table(text: str, delimiter: str) -> Lines:
    """Rows under a header with a column `prompt` in any case of letters; other columns are metadata."""
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(rows, [])
        names = _columns(header, header)
        for row in rows:
            if any(cell.strip() for cell in row):
                yield rows.line_num, _row(row, names, rows.line_num)
    except csv.Error as error:
        raise Broken(rows.line_num, f"not a table ({error})") from None


def tabs(text: str) -> Lines:
    """A table with tabs, in which a quotation mark is text: one row a line."""
    lines = BREAK.split(text)
    names = _columns(lines[0].split("\t"), lines[0])
    for number, line in enumerate(lines[1:], 2):
        if line.strip():
            yield number, _row(line.split("\t"), names, number)


def _columns(header: list[str], given: object) -> list[str]:
    """A table's columns, `prompt` among them; `given`: the header as it stands in the file."""
    names = ["prompt" if name.strip().lower() == "prompt" else name.strip() for name in header]
    if names.count("prompt") != 1 or len(set(names)) < len(names):
        raise Broken(1, f"its header is {shown(given)}, expected names that differ and a column prompt")
    return names


def _row(cells: list[str], names: list[str], number: int) -> Entry | Broken:
    if len(cells) != len(names):
        return Broken(number, f"{len(cells)} columns, the header has {len(names)}")
    return checked(dict(zip(names, cells, strict=True)))


def checked(entry: Any) -> Entry | Broken:
    """An entry with a prompt, or what is wrong with it."""
    whole = {"prompt": entry} if isinstance(entry, str) else entry
    if not isinstance(whole, dict) or not isinstance(whole.get("prompt"), str):
        return Broken(0, f"got {shown(entry)}, expected an object with a string 'prompt'")
    if not whole["prompt"].strip():
        return Broken(0, "the prompt is empty")
    if "\0" in whole["prompt"]:
        return Broken(0, "a NUL in the prompt")
    return whole


READERS: dict[str, Callable[[str], Lines]] = {
    ".txt": as_text,
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_list,
    ".csv": lambda text: table(text, ","),
    ".tsv": tabs,
}
