"""Scores of an evaluation's samples: asked once, and kept for what they depend on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from diffalign.evaluation import samples
from diffalign.evaluation import score_cache as cache
from diffalign.evaluation.task import Task
from diffalign.prompts import files as prompt_files
from diffalign.rewards import catalog, content
from diffalign.rewards.base import Reward
from diffalign.rewards.scorer import Scorer
from diffalign.runtime.progress import Progress, silent
from diffalign.types import Media, Prompts


@contextmanager
def _scores(out: Path) -> Iterator[cache.ScoreCache]:
    kept = cache.ScoreCache(out / "scores.sqlite")
    try:
        yield kept
    finally:
        kept.close()


def scores(
    task: Task,
    folder: Path,
    parts: Sequence[Sequence[int]],
    rewards: Mapping[str, Reward],
    fps: float | None = None,
    progress: Progress = silent,
) -> tuple[list[int], dict[str, np.ndarray]]:
    """Scores of some samples by reward, from the cache where they are there, and which samples these are. parts: rows that are judged
    together; for rewards that compare the samples of a prompt, all of a prompt's. fps:
    of videos, None: not known."""
    found: dict[str, list[float]] = {name: [] for name in rewards}
    with _scores(folder.parent) as kept:
        for part in parts if rewards else ():
            frames = _stacked(folder, part)
            entries = [task.entries[row // task.samples] for row in part]
            progress(f"{folder.name}: judging", len(next(iter(found.values()))), sum(map(len, parts)))
            for name, reward in rewards.items():
                found[name] += _scored(name, reward, frames, entries, kept, fps)
    return [row for part in parts for row in part], {name: np.array(values) for name, values in found.items()}


def _stacked(folder: Path, rows: Sequence[int]) -> np.ndarray:
    """Samples (n, F, H, W, 3) of one model, which all have one size."""
    shots = [samples.read(folder, row) for row in rows]
    for row, frames in zip(rows, shots, strict=True):
        if frames.shape != shots[0].shape:
            why = f"its size is {frames.shape}, others' is {shots[0].shape}"
            raise samples.damaged(samples.path(folder, row), why)
    return np.stack(shots)


def _scored(
    name: str,
    reward: Reward,
    frames: np.ndarray,
    entries: list[prompt_files.Entry],
    kept: cache.ScoreCache,
    fps: float | None,
) -> list[float]:
    entry_of, files = catalog.find(name), {*reward.files, *kept.files(name)}

    def keys() -> list[str] | None:
        """Of the samples' scores; None where what they depend on cannot be known, or is more than the sample."""
        version = None if reward.grouped else cache.version(entry_of, tuple(files))
        given = zip(frames, entries, strict=True)
        return None if version is None else [cache.key(shot, entry, name, version, fps) for shot, entry in given]

    asked = keys()
    known = [None] * len(entries) if asked is None else kept.read(asked)
    new = [k for k, value in enumerate(known) if value is None]
    if new:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        pixels = torch.from_numpy(frames[new]).to(device).permute(0, 1, 4, 2, 3).float() / 255
        numbers = np.arange(len(new))
        group = np.zeros_like(numbers) if reward.grouped else numbers
        prompts = Prompts([entries[k]["prompt"] for k in new], group, numbers, numbers, [entries[k] for k in new])
        with content.opened() as seen:
            values = Scorer({name: reward}).scores(Media(pixels, fps), prompts).by_name[name].tolist()
        read = set(content.own_files(entry_of, seen)) - files
        if asked is not None and read:  # files that it reads while it scores: another version
            kept.note(name, read)
            files |= read
            asked = keys()
        if asked is not None:
            kept.write([asked[k] for k in new], values)
        for k, value in zip(new, values, strict=True):
            known[k] = value
    return [float("nan") if value is None else value for value in known]
