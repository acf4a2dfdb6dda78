"""`diffalign rewards check NAME`: does a reward work here, and does it tell pictures apart?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from diffalign.rewards.base import evaluate
from diffalign.rewards.catalog import find
from diffalign.rewards.load import load
from diffalign.shapes import motion
from diffalign.shapes.captions import Combination, caption
from diffalign.shapes.world import Object, render
from diffalign.types import Fault, Media, Prompts


def check(name: str) -> list[str]:
    """Score three built-in pictures or videos of one caption: right, wrong and noise.

    Raises:
        Fault: if a score is missing or all are equal.
    """
    entry = find(name)
    wanted, shots = _writing() if entry.shown == "text" else _videos() if entry.modality == "video" else _pictures()
    pixels = torch.from_numpy(shots).permute(0, 1, 4, 2, 3) / 255
    keys = np.arange(3)
    prompts = Prompts([wanted["prompt"]] * 3, keys, keys, keys, [wanted] * 3)
    scores = evaluate({name: load(name)}, {name: 1.0}, Media(pixels), prompts)
    values = scores.by_name[name]
    if not scores.valid.all():
        raise Fault(f"reward {name}: gave {values.tolist()} for three samples, a score is not finite")
    if np.ptp(values) == 0:
        raise Fault(f"reward {name}: gave {values[0]:g} for three different samples, it cannot tell them apart")
    able = find(name).differentiable
    if able:
        _check_gradient(name, Media(pixels.float().requires_grad_()), prompts)
    labels = ("as asked", "another", "noise")
    lines = [f"{label:9} {value:.4f}" for label, value in zip(labels, values, strict=True)]
    kind = "differentiable" if able else "black box"
    return [f"{name}, {kind}: {wanted['prompt']!r}", *lines, "ok"]


def _pictures() -> tuple[dict[str, Any], NDArray[np.uint8]]:
    """Metadata, and pictures (3, 1, 64, 64, 3)."""
    right = render((Object("circle", "red", 32, 32, 12),))
    wrong = render((Object("square", "blue", 20, 40, 9), Object("star", "green", 44, 20, 9)))
    noise = np.random.default_rng(0).integers(0, 256, right.shape, dtype=np.uint8)
    return caption(Combination("colors", (("circle", "red"),))), np.stack([right, wrong, noise])[:, None]


def _writing() -> tuple[dict[str, Any], NDArray[np.uint8]]:
    """Metadata, and pictures (3, 1, 96, 256, 3) of the word asked for, another one, and noise."""
    shots = []
    for word in ("STAR", "MOON"):
        picture = Image.new("RGB", (256, 96), "white")
        ImageDraw.Draw(picture).text((40, 20), word, fill="black", font=ImageFont.load_default(48))
        shots.append(np.asarray(picture))
    noise = np.random.default_rng(0).integers(0, 256, shots[0].shape, dtype=np.uint8)
    return {"prompt": 'a sign that says "STAR"'}, np.stack([*shots, noise])[:, None]


def _videos() -> tuple[dict[str, Any], NDArray[np.uint8]]:
    """Metadata, and videos (3, 5, 32, 32, 3)."""
    wanted = motion.Combination("circle", "red", "moving right")
    rng = np.random.default_rng(0)
    right = motion.video(wanted, rng)
    wrong = motion.video(motion.Combination("star", "green", "moving up"), rng)
    noise = rng.integers(0, 256, right.shape, dtype=np.uint8)
    return motion.caption(wanted), np.stack([right, wrong, noise])


def _check_gradient(name: str, media: Media, prompts: Prompts) -> None:
    value = load(name)(media, prompts)
    slope = None
    if isinstance(value, torch.Tensor) and value.requires_grad:
        (slope,) = torch.autograd.grad(value.sum(), media.pixels, allow_unused=True)
    if slope is None:
        raise Fault(f"reward {name}: is declared differentiable and has no gradient to the pictures")
    if not slope.isfinite().all() or not slope.any():
        raise Fault(f"reward {name}: its gradient to the pictures is zero or not finite")
