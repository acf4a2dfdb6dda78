"""Where prompts come from: a set by name, or a file. Needs no torch.

A file is text, one prompt a line, or JSON lines of objects with a `prompt` and whatever metadata a reward needs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffalign.errors import UserError
from diffalign.prompts import sets as prompt_sets
from diffalign.prompts.sets import Entry as Entry
from diffalign.runtime.files import is_file
from diffalign.types import Prompts

Stages = dict[str, tuple[str, ...]]  # prompt -> what the sampler is told instead, on each stretch of the chain


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


def held_out(entries: list[Entry], share: float) -> tuple[list[Entry], list[Entry]]:
    """Entries to train on and entries to evaluate on: that share of the texts, those whose hashes are lowest, so that a text stays on
    its side whatever else is in the file. Of few texts none is held out, and both are all entries.
    """
    texts = {entry["prompt"] for entry in entries}
    order = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
    held = set(order[: min(round(share * len(order)), len(order) - 1)])
    if not held:
        return entries, entries
    parts: tuple[list[Entry], list[Entry]] = ([], [])
    for entry in entries:
        parts[entry["prompt"] in held].append(entry)
    return parts


def read_stages(source: str, entries: list[Entry], field: str = "prompts.stages") -> Stages:
    """Each entry's stage prompts: of the shapes world by name, or from JSON lines of objects with `prompt` and `stages`.

    Raises:
        UserError: naming the file and what is broken or missing.
    """
    wanted = list(dict.fromkeys(entry["prompt"] for entry in entries))
    if source == "shapes":
        from diffalign.shapes import captions

        return {prompt: captions.stages(prompt) for prompt in wanted}
    found: Stages = {}
    for entry in read(source, (), "", field):
        texts = entry.get("stages")
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise UserError(f"{field}: {source}: {entry['prompt']!r} has stages {texts!r}, expected a list of texts")
        if found.setdefault(entry["prompt"], tuple(texts)) != tuple(texts):
            raise UserError(f"{field}: {source} has {entry['prompt']!r} twice, with different stages")
    if missing := [prompt for prompt in wanted if prompt not in found]:
        raise UserError(f"{field}: {source} lacks {len(missing)} of {len(wanted)} prompts, such as {missing[0]!r}")
    if len(counts := {len(found[prompt]) for prompt in wanted}) > 1:
        raise UserError(f"{field}: {source} has {min(counts)} to {max(counts)} stages a prompt; allowed is one number")
    return {prompt: found[prompt] for prompt in wanted}


def draw(
    entries: list[Entry], groups: int, group_size: int, seed: int, update: int, stages: Stages | None = None
) -> Prompts:
    """`groups` prompts of one pass after another over shuffled entries, each `group_size` times, with keys for noise."""
    from diffalign.runtime.randomness import key, numpy_generator

    places = [divmod(position, len(entries)) for position in range(update * groups, (update + 1) * groups)]
    orders = {lap: numpy_generator(seed, 11, lap).permutation(len(entries)) for lap, _ in places}
    picks = [int(orders[lap][place]) for lap, place in places]
    count = groups * group_size
    group = np.repeat(np.arange(groups), group_size)
    chosen = [entries[picks[g]] for g in group]
    return Prompts(
        text=[entry["prompt"] for entry in chosen],
        group=group,
        seed=np.array([key(seed, 12, update, k) for k in range(count)]),
        group_seed=np.array([key(seed, 13, update, int(g)) for g in group]),
        metadata=chosen,
        stages=_told(chosen, stages),
    )


def _told(chosen: list[Entry], stages: Stages | None) -> list[tuple[str, ...]]:
    return [stages[entry["prompt"]] for entry in chosen] if stages else []


def same_text(entries: Sequence[Entry]) -> NDArray[np.int64]:
    """Ids (n,) of prompts: entries with one text, whatever their metadata, are one prompt when samples are compared."""
    names: dict[str, int] = {}
    return np.array([names.setdefault(entry["prompt"], len(names)) for entry in entries], dtype=np.int64)


def fixed(entries: list[Entry], images_per_prompt: int, seed: int, stages: Stages | None = None) -> Prompts:
    """Every entry `images_per_prompt` times with fixed seeds, whatever the update: for evaluation."""
    from diffalign.runtime.randomness import key

    places = np.repeat(np.arange(len(entries)), images_per_prompt)
    seeds = np.array([key(seed, 14, k) for k in range(len(places))])
    chosen = [entries[k] for k in places]
    group = same_text(entries)[places]
    texts = [entry["prompt"] for entry in chosen]
    return Prompts(texts, group, seeds, seeds, chosen, _told(chosen, stages))
