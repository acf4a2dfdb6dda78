"""The moving world: one shape crosses a plain background or stands still, in five frames of 32 x 32 pixels.

Captions, the videos they ask for, their splits and the judge. Metadata are GenEval's (`include`) with `motion` besides.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffalign.ops import geneval
from diffalign.shapes.captions import SPLITS, clause, phrase
from diffalign.shapes.detector import Found, detect
from diffalign.shapes.world import BACKGROUND, BOX, COLOURS, MARGIN, SHAPES, Object, render
from diffalign.types import Floats

FRAMES, SIZE = 5, 32
MOTIONS = {
    "moving left": (-1, 0),
    "moving right": (1, 0),
    "moving up": (0, -1),
    "moving down": (0, 1),
    "standing still": (0, 0),
}
RADIUS = (5.0, 6.5)
TRAVEL = (8.0, 13.0)  # pixels from the first frame to the last
ENOUGH = 5.0  # pixels of the way that count as moving
STILL = 1.0  # pixels that count as standing
INK = 30.0  # channel difference from the background above which a pixel belongs to something


@dataclass(frozen=True)
class Combination:
    """What a caption asks for: a shape, its colour or None, and how it moves."""

    shape: str
    colour: str | None
    motion: str


def caption(combination: Combination) -> dict[str, Any]:
    """Metadata of a combination, such as "a red circle moving left"."""
    shape, colour, motion = combination.shape, combination.colour, combination.motion
    prompt = f"{phrase(shape, colour)} {motion}"
    return {"tag": "motion", "include": [clause(shape, colour)], "motion": motion, "prompt": prompt}


@cache
def split(name: str) -> tuple[Combination, ...]:
    """The combinations of one split: test 2/7, validation 1/7, train the rest; fixed for ever."""
    if name not in SPLITS:
        raise ValueError(f"split: got {name!r}, allowed are {', '.join(SPLITS)}")
    everything = [Combination(*parts) for parts in itertools.product(SHAPES, (None, *COLOURS), MOTIONS)]
    order = np.random.default_rng([20, 7]).permutation(len(everything))
    n_test, n_val = round(len(order) * 2 / 7), round(len(order) / 7)
    chosen = {"test": order[:n_test], "validation": order[n_test : n_test + n_val], "train": order[n_test + n_val :]}
    return tuple(everything[k] for k in sorted(chosen[name]))


def captions(name: str) -> list[dict[str, Any]]:
    """All metadata of a split, in a fixed order."""
    return [caption(combination) for combination in split(name)]


def video(combination: Combination, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A video that a caption asks for, (5, 32, 32, 3) uint8: what it leaves open is uniform over what fits."""
    shape, colour = combination.shape, combination.colour or COLOURS[rng.integers(len(COLOURS))]
    radius = rng.uniform(*RADIUS)
    box = radius * np.array(BOX[shape]).reshape(2, 2)
    way = rng.uniform(*TRAVEL) * np.array(MOTIONS[combination.motion], float)
    # Both ends must fit: low <= start + min(0, way), start + max(0, way) <= high.
    low = MARGIN - box[0] - np.minimum(way, 0)
    high = SIZE - MARGIN - box[1] - np.maximum(way, 0)
    start = rng.uniform(low, high)
    places = start + np.linspace(0, 1, FRAMES)[:, None] * way
    return np.stack([render((Object(shape, colour, x, y, radius),), SIZE) for x, y in places])


def ink(frame: NDArray[np.uint8]) -> Floats | None:
    """Centre (x, y) in pixels of all that is not background, None if there is nothing."""
    marked = np.abs(frame.astype(float) - np.array(BACKGROUND)).max(-1) > INK
    rows, columns = np.nonzero(marked)
    return np.array([columns.mean(), rows.mean()]) + 0.5 if len(rows) else None


def official(frames: NDArray[np.uint8], metadata: dict[str, Any]) -> geneval.Verdict:
    """Whether every frame of (F, H, W, 3) uint8 shows exactly what is asked for and its way is as asked."""
    found = [detect(frame) for frame in frames]
    for index, frame in enumerate(found):
        verdict = geneval.strict(frame.objects, metadata, frame.residue)
        if not verdict.correct:
            return geneval.Verdict(False, f"frame {index}: {verdict.reason}")
    moved = _moves(_path(found), metadata["motion"])
    return geneval.Verdict(moved, "" if moved else f"not {metadata['motion']}")


def partial(frames: NDArray[np.uint8], metadata: dict[str, Any]) -> float:
    """Mean of the frames' credit for what is shown and the credit for how it moves, in [0, 1]."""
    shown = float(np.mean([geneval.partial(detect(frame).objects, metadata) for frame in frames]))
    return (shown + _credit([ink(frame) for frame in frames], metadata["motion"])) / 2


def _path(found: list[Found]) -> Floats:
    """Centres (F, 2) of the boxes of frames with one object each."""
    boxes = np.array([frame.objects[0].box for frame in found])
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def _moves(path: Floats, motion: str) -> bool:
    """Standing: never a pixel away. Moving: onwards in every frame, far enough, and three times as far as sideways."""
    direction = np.array(MOTIONS[motion])
    way = path - path[0]
    if not direction.any():
        return bool(np.linalg.norm(way, axis=1).max() <= STILL)
    along, across = way @ direction, np.abs(way @ direction[::-1])
    return bool((np.diff(along) > 0).all() and along[-1] >= ENOUGH and along[-1] >= 3 * across.max())


def _credit(centres: list[Floats | None], motion: str) -> float:
    """Share of the wanted way that the picture's content goes from the first frame to the last, sideways taken off."""
    first, last = centres[0], centres[-1]
    if first is None or last is None:
        return 0.0
    direction, way = np.array(MOTIONS[motion]), last - first
    if not direction.any():
        return float(np.clip(1 - np.linalg.norm(way) / ENOUGH, 0, 1))
    return float(np.clip((way @ direction - abs(way @ direction[::-1])) / ENOUGH, 0, 1))
