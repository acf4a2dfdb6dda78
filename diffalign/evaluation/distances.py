"""How far pictures are from one another: diversity within a prompt, drift from the base model. Pure functions of arrays."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from diffalign.types import Floats, Integers

THUMBNAIL = 16  # pixels a side


def thumbnails(frames: NDArray[np.uint8]) -> Floats:
    """Samples (n, F, H, W, 3) as (n, F * 16 * 16 * 3) means of blocks, in [0, 1]."""
    n, _, h, w, _ = frames.shape
    rows, columns = (np.linspace(0, size, min(size, THUMBNAIL) + 1).astype(int)[:-1] for size in (h, w))
    sums = np.add.reduceat(np.add.reduceat(frames.astype(np.float64), rows, axis=2), columns, axis=3)
    area = np.diff([*rows, h])[:, None, None] * np.diff([*columns, w])[None, :, None]
    return (sums / area / 255).reshape(n, -1)


def diversity(pictures: Floats, prompt: Integers) -> Floats:
    """(n,) each sample's mean distance (root mean square) to the others of its prompt, NaN where it is alone."""
    distances, counts = np.zeros(len(pictures)), np.zeros(len(pictures))
    for name in np.unique(prompt):
        for a, b in combinations(np.flatnonzero(prompt == name), 2):
            apart = np.sqrt(np.mean((pictures[a] - pictures[b]) ** 2))
            distances[[a, b]] += apart
            counts[[a, b]] += 1
    return np.divide(distances, counts, out=np.full(len(pictures), np.nan), where=counts > 0)


def drift(pictures: Floats, base: Floats) -> Floats:
    """(n,) distance (root mean square) of each sample from the base model's of the same seed."""
    return np.sqrt(np.mean((pictures - base) ** 2, axis=1))
