"""Samples of an evaluation as files: a PNG each, the frames of a video side by side."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from diffalign.errors import Fault, one_line
from diffalign.runtime.progress import Progress
from diffalign.sampling import calling, sources
from diffalign.types import chunks

if TYPE_CHECKING:
    from diffalign.evaluation.task import Task


@dataclass(frozen=True)
class Drawn:
    """A model's samples and their scores (total,) by reward."""

    folder: Path
    scores: dict[str, NDArray[np.float64]]


NAME = re.compile(r"\d{6}\.png", re.ASCII)


def path(folder: Path, row: int) -> Path:
    """The file of a sample."""
    return folder / f"{row:06d}.png"


def write(frames: NDArray[np.uint8], place: Path, drift: float | None = None, batch: int = 1) -> None:
    """Keep a sample (F, H, W, 3), how far its predictions were from the base model's, and how many were drawn at once: the file
    appears whole."""
    notes = PngImagePlugin.PngInfo()
    notes.add_text("frames", str(len(frames)))
    notes.add_text("batch", str(batch))
    if drift is not None:
        notes.add_text("drift", repr(drift))
    part = place.with_suffix(f".{os.getpid()}")
    Image.fromarray(np.concatenate(frames, axis=1)).save(part, "PNG", pnginfo=notes)
    os.replace(part, place)


def read(folder: Path, row: int) -> NDArray[np.uint8]:
    """A sample's frames (F, H, W, 3).

    Raises:
        Fault: if the file is damaged.
    """
    place = path(folder, row)
    try:
        with Image.open(place) as picture:
            count = int(picture.info.get("frames", 1))
            strip = np.asarray(picture.convert("RGB"))
        return np.stack(np.split(strip, count, axis=1))
    except (OSError, SyntaxError, ValueError, ZeroDivisionError, Image.DecompressionBombError) as error:
        raise damaged(place, one_line(error)) from error


def damaged(place: Path, why: str) -> Fault:
    """What to say of a file that cannot be used."""
    return Fault(f"{place}: damaged ({why}); delete it, the same command makes it again")


def drift(folder: Path, row: int) -> float:
    """How far a sample's predictions were from the base model's, NaN where that was not measured."""
    return _note(folder, row, "drift")


def batch(folder: Path, row: int) -> float:
    """How many samples were drawn at once, NaN where that is not known."""
    return _note(folder, row, "batch")


def _note(folder: Path, row: int, name: str) -> float:
    try:
        with Image.open(path(folder, row)) as picture:
            return float(picture.info.get(name, "nan"))
    except (OSError, SyntaxError, ValueError, ZeroDivisionError, Image.DecompressionBombError) as error:
        raise damaged(path(folder, row), one_line(error)) from error


Opened = tuple[Any, Callable[[list[str], list[int]], Any]]  # a pipeline, and what draws by it


def opened(model: sources.Source) -> Opened:
    """A model, loaded.

    Raises:
        UserError: if it does not load, or refuses its call.
    """
    pipe = sources.pipeline(model)
    return pipe, calling.drawer(pipe, model)


def draw(
    task: Task,
    model: sources.Source,
    folder: Path,
    rows: Sequence[int],
    missing: Set[int],
    progress: Progress,
    ready: Opened | None = None,
) -> None:
    """Draw the missing ones of some rows by the plain pipeline, each among the rows that it was first drawn with: on some processors the
    last bits of a picture depend on how many are drawn at once.

    Raises:
        UserError: if the model does not load, or refuses its call.
        Fault: if memory does not suffice, or a sample is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    from diffalign.models import lora as adapters

    progress(f"{folder.name}: loading", 0, 0)
    pipe, draw_some = ready or opened(model)
    batches = [[rows[k] for k in part] for part in chunks(len(rows), task.batch)]
    wanted = [own for own in batches if not missing.isdisjoint(own)]
    done = 0
    for own in wanted:
        progress(f"{folder.name}: drawing", done, len(missing))
        texts = [task.entries[row // task.samples]["prompt"] for row in own]
        seeds = [task.seed_of(row) for row in own]
        drifts: list[float | None] = [None] * len(own)
        if model.adapters and task.drift:
            with adapters.compared(pipe, len(own)) as apart:
                shots = draw_some(texts, seeds)
            drifts = list(apart())
        else:
            shots = draw_some(texts, seeds)
        for row, shot, apart_by in zip(own, shots, drifts, strict=True):
            frames = np.asarray(shot)
            if not np.isfinite(frames).all():
                raise Fault(f"{folder.name}: sample {row} has numbers that are not finite")
            frames = frames if frames.ndim == 4 else frames[None]
            if row in missing:
                write(np.round(frames * 255).astype(np.uint8), path(folder, row), apart_by, task.batch)
                done += 1
