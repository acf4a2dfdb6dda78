"""What pictures look like without a judge: how far they are from one another and from the base model's, and whether anything is on them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from diffalign.types import Floats, Integers, rows_by_group

THUMBNAIL = 16  # pixels a side


def thumbnails(frames: NDArray[np.uint8]) -> Floats:
    """Samples (n, F, H, W, 3) as (n, F * 16 * 16 * 3) means of blocks, in [0, 1]."""
    n, _, h, w, _ = frames.shape
    rows, columns = (np.linspace(0, size, min(size, THUMBNAIL) + 1).astype(int)[:-1] for size in (h, w))
    sums = np.add.reduceat(np.add.reduceat(frames.astype(np.float64), rows, axis=2), columns, axis=3)
    area = np.diff([*rows, h])[:, None, None] * np.diff([*columns, w])[None, :, None]
    return (sums / area / 255).reshape(n, -1)


def small(pixels: Tensor) -> Tensor:
    """The same of samples (n, F, 3, H, W) in [0, 1], where they are."""
    n, _, _, h, w = pixels.shape
    means = adaptive_avg_pool2d(pixels.detach().flatten(0, 1).float(), (min(h, THUMBNAIL), min(w, THUMBNAIL)))
    return means.reshape(n, -1)


def contrast(pixels: Tensor) -> Tensor:
    """(n,) how much is on samples (n, F, 3, H, W): root mean square deviation of thumbnails from their colour channels' means."""
    flat = small(pixels).reshape(len(pixels), pixels.shape[1] * 3, -1)
    return (flat - flat.mean(2, keepdim=True)).square().mean((1, 2)).sqrt()


def diversity(pictures: Floats, prompt: Integers) -> Floats:
    """(n,) each sample's mean distance (root mean square) to the others of its prompt, NaN where it is alone."""
    found = np.full(len(pictures), np.nan)
    for own in rows_by_group(prompt):
        if len(own) > 1:  # a sample is at 0 from itself
            found[own] = cdist(pictures[own], pictures[own]).sum(1) / (len(own) - 1) / np.sqrt(pictures.shape[1])
    return found


def drift(pictures: Floats, base: Floats) -> Floats:
    """(n,) distance (root mean square) of each sample from the base model's of the same seed."""
    return np.sqrt(np.mean((pictures - base) ** 2, axis=1))
