"""Scores of an evaluation's samples: asked once, and kept for what they depend on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from diffalign.types import Media, Prompts, chunks


@contextmanager
def _scores(out: Path) -> Iterator[cache.ScoreCache]:
    kept = cache.ScoreCache(out / "scores.sqlite")
    try:
        yield kept
    finally:
        kept.close()


def scores(
    task: Task, folder: Path, rows: Sequence[int], scorer: Scorer, progress: Progress = silent
) -> dict[str, np.ndarray]:
    """Scores of some samples by reward, from the cache where they are there."""
    found = {name: np.full(len(rows), np.nan) for name in scorer.rewards}
    with _scores(folder.parent) as kept:
        for part in chunks(len(rows), task.batch):
            frames = _stacked(folder, [rows[k] for k in part])
            entries = [task.entries[rows[k] // task.samples] for k in part]
            progress(f"{folder.name}: judging", part[0], len(rows))
            for name, reward in scorer.rewards.items():
                found[name][list(part)] = _scored(name, reward, frames, entries, kept)
    return found


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
) -> list[float]:
    entry_of, files = catalog.find(name), {*reward.files, *kept.files(name)}

    def keys() -> list[str] | None:
        """Of the samples' scores; None where what they depend on cannot be known."""
        version = cache.version(entry_of, tuple(files))
        given = zip(frames, entries, strict=True)
        return None if version is None else [cache.key(shot, entry, name, version) for shot, entry in given]

    asked = keys()
    known = [None] * len(entries) if asked is None else kept.read(asked)
    new = [k for k, value in enumerate(known) if value is None]
    if new:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        pixels = torch.from_numpy(frames[new]).to(device).permute(0, 1, 4, 2, 3).float() / 255
        numbers = np.arange(len(new))
        prompts = Prompts([entries[k]["prompt"] for k in new], numbers, numbers, numbers, [entries[k] for k in new])
        with content.opened() as seen:
            values = Scorer({name: reward}).scores(Media(pixels), prompts).by_name[name].tolist()
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
