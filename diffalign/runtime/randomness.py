"""Every random draw comes from a generator keyed by integers such as (seed, update, sample, step).

So a resumed, re-sharded or re-batched run draws the same numbers, and nothing about randomness needs a checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum, unique
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

_MASK = (1 << 64) - 1


@unique
class Purpose(IntEnum):
    """What a draw is for: the second part of its key, after a seed. Numbers are for ever: another one is another run."""

    ORDER = 11  # of prompts in a pass over them
    SAMPLE = 12  # the seeds of an update's samples
    GROUP = 13  # the seeds that an update's groups share
    FIXED = 14  # the seeds of a run's evaluation
    PLAN = 15  # a rule's draws for an update
    DIRECTION = 16  # noise on parameters
    SUITE = 17  # the seeds of an evaluation by a suite
    FORWARD = 18  # noise on finished samples, to learn from
    VARIANT = 19  # noise on finished samples, to go on from (DRaFT-LV)
    FURTHER = 20  # the seeds of a group's samples beyond those it was drawn with
    LOT = 21  # which of equally good samples are kept
    ANCHOR = 22  # which of the base model's samples a step learns, at which levels
    TOY = 1 << 40  # the start of the Gaussian chain


SHARED = 1  # after a sampler's step: the part of siblings' noise that they share


def key(*parts: int) -> int:
    """A 63-bit key of some integers; the mixer is SplitMix64 (Steele et al. 2014)."""
    state = 0
    for part in parts:
        state = (state ^ (int(part) & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state >> 1


def numpy_generator(*parts: int) -> np.random.Generator:
    """A counter-based generator of its own for every key."""
    return np.random.Generator(np.random.Philox(key=key(*parts)))


def normal(seeds: Sequence[int], shape: Sequence[int], *purpose: int, like: Tensor) -> Tensor:
    """Standard normal noise (len(seeds), *shape), row k drawn from (seeds[k], *purpose), on `like`'s device and dtype."""
    import torch

    dtype = np.float64 if like.dtype == torch.float64 else np.float32
    rows = np.empty((len(seeds), *shape), dtype)
    for row, seed in zip(rows, seeds, strict=True):
        numpy_generator(int(seed), *purpose).standard_normal(out=row, dtype=dtype)
    return torch.from_numpy(rows).to(device=like.device, dtype=like.dtype)
