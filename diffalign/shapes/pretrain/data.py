"""Rendered scenes and videos with their captions, training split only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffalign.shapes import captions, motion
from diffalign.shapes.world import render

# Share of scenes per task: the relations and counts are harder to learn than the colours.
MIX = {
    "single_object": 0.06,
    "two_object": 0.10,
    "counting": 0.22,
    "colors": 0.12,
    "position": 0.28,
    "color_attr": 0.22,
}


@dataclass(frozen=True)
class Dataset:
    """images (n, 64, 64, 3) or videos (n, 5, 32, 32, 3), uint8, and their captions (n)."""

    images: NDArray[np.uint8]
    prompts: list[str]


def pictures(count: int, seed: int) -> Dataset:
    """Render `count` scenes of the training combinations."""
    rng = np.random.default_rng([seed, 1])
    tasks = rng.choice(list(MIX), size=count, p=list(MIX.values()))
    images, prompts = np.empty((count, 64, 64, 3), np.uint8), []
    for k, task in enumerate(tasks):
        options = captions.split(str(task), "train")
        combination = options[rng.integers(len(options))]
        images[k] = render(captions.scene(combination, rng))
        prompts.append(captions.caption(combination, bool(rng.integers(2)))["prompt"])
    return Dataset(images, prompts)


def videos(count: int, seed: int) -> Dataset:
    """Render `count` videos of the training combinations."""
    rng = np.random.default_rng([seed, 1])
    options = motion.split("train")
    chosen = [options[k] for k in rng.integers(len(options), size=count)]
    return Dataset(np.stack([motion.video(c, rng) for c in chosen]), [motion.caption(c)["prompt"] for c in chosen])
