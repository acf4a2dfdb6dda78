"""Pictures and videos as they are drawn, chosen and written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.errors import UserError
from diffalign.prompts.files import Entry
from diffalign.runtime.progress import Progress

FPS = 16  # of videos, where nobody says it

Judgement = Callable[[Sequence[Any], Mapping[str, Any]], Any]  # pictures of a caption, its entry -> a score each


@dataclass(frozen=True)
class Shot:
    """A picture that was written, or a video beside it, the seed it was drawn from, and what a judge said of it."""

    path: Path
    seed: int
    score: float | None = None


@dataclass
class Files:
    """Where pictures go; fps: of videos; batch: pictures a call."""

    out: Path
    fps: float
    batch: int
    progress: Progress

    def draw(
        self,
        draw: Callable[[Sequence[str], Sequence[int]], Any],
        entries: Sequence[Entry],
        seeds: Sequence[Sequence[int]],
        ending: str = "",
        judge: Judgement | None = None,
        keep: int = 0,
    ) -> list[Shot]:
        """Draw each caption from its seeds and write the pictures; with a judge only the `keep` best, the best first."""
        found: list[Shot] = []
        what, done, total = "sampling the base" if ending else "sampling", 0, sum(map(len, seeds))
        for number, (entry, own) in enumerate(zip(entries, seeds, strict=True)):
            shots: list[tuple[int, Any, float | None]] = []
            for start in range(0, len(own), self.batch):
                self.progress(what, done, total)
                some = own[start : start + self.batch]
                new = list(draw([entry["prompt"]] * len(some), some))
                done += len(some)
                scores = [None] * len(some) if judge is None else list(judge(new, entry))
                shots = best([*shots, *zip(some, new, scores, strict=True)], keep if judge else None)
            for seed, shot, score in shots:
                path = write(shot, self.out / f"{number:03d}_seed{seed}{ending}.png", self.fps)
                found.append(Shot(path, seed, None if score is None else float(score)))
        return found


def best(shots: list[tuple[int, Any, float | None]], keep: int | None) -> list[tuple[int, Any, float | None]]:
    """Of (seed, picture, score) those of the highest scores, the highest first; equal ones, and those without a score, by seed. None: all,
    as they are.
    """
    if keep is None:
        return shots

    def order(shot: tuple[int, Any, float | None]) -> tuple[bool, float, int]:
        score = shot[2] if shot[2] is not None and np.isfinite(shot[2]) else None
        return score is None, -(score or 0.0), shot[0]

    return sorted(shots, key=order)[:keep]


def write(shot: Any, path: Path, fps: float) -> Path:
    """A picture (H, W, 3), or a video (F, H, W, 3) as mp4 with its middle frame beside; values in [0, 1]."""
    from PIL import Image

    if not np.isfinite(np.asarray(shot)).all():
        raise UserError(
            f"sample: {path.stem} has numbers that are not finite; the call's arguments or an adapter are at fault"
        )
    shot = np.round(np.asarray(shot) * 255).astype(np.uint8)
    if shot.ndim == 4:
        write_video(shot, path.with_suffix(".mp4"), fps)
        shot = shot[len(shot) // 2]
    Image.fromarray(shot).save(path)
    return path


def write_video(frames: Any, path: Path, fps: float, quality: int = 5) -> None:
    """Frames (F, H, W, 3) uint8 as mp4; quality: 0 to 10, the best."""
    from imageio.v2 import mimwrite

    mimwrite(path, list(frames), fps=fps, macro_block_size=2, quality=quality)
