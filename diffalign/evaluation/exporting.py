"""Samples of an evaluation as the files that others' tools judge."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffalign.errors import UserError
from diffalign.evaluation import samples
from diffalign.runtime.files import write_text
from diffalign.sampling.shots import FPS, write_video

if TYPE_CHECKING:
    from diffalign.evaluation.task import Task

LONGEST = 255  # bytes of a file's name, of nearly all file systems
ROOM = len("-99999.mp4")


def vbench(
    task: Task, folders: Mapping[Path, float | None], out: Path, say: Callable[[str], None] = print
) -> list[Path]:
    """Each model's videos as VBench's own tool wants them, `PROMPT-INDEX.mp4` in a folder a model, and `names.json`, which says of every
    file its prompt. folders: of the samples, with their frames per second, None: 16. What is there and newer than its sample stays.

    Raises:
        UserError: if a model made pictures.
    """
    texts = [entry["prompt"] for entry in task.entries for _ in range(task.samples)]
    places = []
    for folder, fps in folders.items():
        place = out / "vbench" / folder.name
        place.mkdir(parents=True, exist_ok=True)
        files = file_names(texts)
        for row, name in enumerate(files):
            target, sample = place / name, samples.path(folder, row)
            if target.is_file() and target.stat().st_mtime_ns >= sample.stat().st_mtime_ns:
                continue
            frames = samples.read(folder, row)
            if len(frames) == 1:
                raise UserError(f"--export: vbench is of videos, {folder.name} made pictures")
            write_video(frames, target, fps or FPS, quality=10)
        write_text(place / "names.json", json.dumps(dict(zip(files, texts, strict=True)), indent=1) + "\n")
        if changed := sum(not name.startswith(f"{text}-") for name, text in zip(files, texts, strict=True)):
            say(f"{place}: {changed} files have no prompt that a file can be named; names.json says which is which")
        places.append(place)
    return places


def file_names(prompts: Sequence[str]) -> list[str]:
    """`PROMPT-INDEX.mp4` for each of some prompts, one after another: the index counts up where a prompt comes again.

    A prompt that no file can be named (a slash, a control character, too long) is shortened and gets eight digits of its sha256, so that
    no two prompts share a file.
    """
    seen: Counter[str] = Counter()
    names = []
    for prompt in prompts:
        names.append(f"{_stem(prompt)}-{seen[prompt]}.mp4")
        seen[prompt] += 1
    return names


def _stem(prompt: str) -> str:
    if not re.search(r"[/\x00-\x1f]", prompt) and len(prompt.encode()) <= LONGEST - ROOM:
        return prompt
    digits = hashlib.sha256(prompt.encode()).hexdigest()[:8]
    safe = re.sub(r"[/\x00-\x1f]", "_", prompt).encode()[: LONGEST - ROOM - len(digits) - 1]
    return f"{safe.decode(errors='ignore')}~{digits}"
