"""`diffalign rewards check NAME`: does a reward work here, and does it tell pictures apart?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from diffalign.errors import Fault
from diffalign.rewards.base import Reward
from diffalign.rewards.catalog import Entry, find
from diffalign.rewards.load import load
from diffalign.rewards.scorer import Scorer
from diffalign.shapes import motion
from diffalign.shapes.captions import Combination, caption
from diffalign.shapes.world import Object, render
from diffalign.types import Media, Prompts

FPS = 8.0  # of the videos here
LABELS = ("as asked", "another", "noise")


def check(name: str) -> list[str]:
    """Score three built-in pictures or videos of one caption: as asked, another one and noise.

    Raises:
        Fault: if a score is missing, all are equal, one is not what is known, or the weights look as if nobody had trained them.
    """
    entry = find(name)
    reward = load(name)
    reward.greet()
    kinds = {"text": _writing, "sign": _signs}
    wanted, shots = kinds.get(entry.shown, _videos if entry.modality == "video" else _pictures)()
    pixels = torch.from_numpy(shots).permute(0, 1, 4, 2, 3) / 255
    keys = np.arange(3)
    reward.sizes = (3,) if reward.grouped else ()
    prompts = Prompts([wanted["prompt"]] * 3, np.zeros_like(keys), keys, keys, [wanted] * 3)
    scores = Scorer({name: reward}).scores(Media(pixels, FPS), prompts)
    values = scores.by_name[name]
    if not scores.valid.all():
        raise Fault(f"reward {name}: gave {values.tolist()} for three samples, a score is not finite")
    if np.ptp(values) == 0:
        raise Fault(f"reward {name}: gave {values[0]:g} for three different samples, it cannot tell them apart")
    _check_known(entry, values)
    for problem in reward.problems():
        raise Fault(f"reward {name}: {problem}")
    if entry.differentiable:
        _check_gradient(name, reward, Media(pixels.float().requires_grad_(), FPS), prompts)
    beside = [f", known is {value:g}" for value in entry.known] or [""] * 3
    lines = [f"{label:9} {value:.4f}{known}" for label, value, known in zip(LABELS, values, beside, strict=True)]
    kind = "differentiable" if entry.differentiable else "black box"
    if not entry.known:
        lines.append("no known values" + (", but the right order" if entry.ordered else ""))
    told = [f"takes     {reward.recognised}"] if reward.recognised else []
    return [f"{name}, {kind}: {wanted['prompt']!r}", *told, *lines, "ok"]


def _check_known(entry: Entry, values: NDArray[np.float64]) -> None:
    for label, value, known in zip(LABELS, values, entry.known or values, strict=True):
        if abs(value - known) > entry.tolerance:
            raise Fault(
                f"reward {entry.name}: gave {value:.4f} for the sample {label!r}, known is {known:g} within {entry.tolerance:g}"
            )
    if entry.ordered and not values[0] > values[1]:
        raise Fault(
            f"reward {entry.name}: gave {values[0]:.4f} for a picture as asked and {values[1]:.4f} for another; are its weights trained?"
        )


def _pictures() -> tuple[dict[str, Any], NDArray[np.uint8]]:
    """Metadata, and pictures (3, 1, 64, 64, 3)."""
    right = render((Object("circle", "red", 32, 32, 12),))
    wrong = render((Object("square", "blue", 20, 40, 9), Object("star", "green", 44, 20, 9)))
    noise = np.random.default_rng(0).integers(0, 256, right.shape, dtype=np.uint8)
    asked = ("Is there a circle in the image?", "Is the circle red?")
    questions = [{"question": question, "answer": "Yes"} for question in asked]
    wanted = caption(Combination("colors", (("circle", "red"),)))
    graph = [{"question": question, "parents": [0] * (number > 0)} for number, question in enumerate(asked)]
    return {**wanted, "questions": questions, "scene_graph": graph}, np.stack([right, wrong, noise])[:, None]


def _writing() -> tuple[dict[str, Any], NDArray[np.uint8]]:
    """Metadata, and pictures (3, 1, 96, 256, 3) of the word asked for, another one, and noise."""
    shots = []
    for word in ("STAR", "MOON"):
        picture = Image.new("RGB", (256, 96), "white")
        ImageDraw.Draw(picture).text((40, 20), word, fill="black", font=ImageFont.load_default(48))
        shots.append(np.asarray(picture))
    noise = np.random.default_rng(0).integers(0, 256, shots[0].shape, dtype=np.uint8)
    return {"prompt": 'a sign that says "STAR"'}, np.stack([*shots, noise])[:, None]


def _signs() -> tuple[dict[str, Any], NDArray[np.uint8]]:
    """Metadata, and pictures (3, 1, 256, 256, 3) of a stop sign, which detectors of everyday objects know, of a disc, and noise."""
    shots = []
    for corners, colour, word in ((8, (190, 20, 30), "STOP"), (60, (40, 160, 220), "")):
        picture = Image.new("RGB", (256, 256), (150, 185, 225))
        pen = ImageDraw.Draw(picture)
        pen.rectangle((122, 128, 134, 256), fill=(110, 110, 110))
        pen.regular_polygon((128, 110, 92), corners, fill="white")
        pen.regular_polygon((128, 110, 85), corners, fill=colour)
        pen.text((128, 110), word, fill="white", font=ImageFont.load_default(52), anchor="mm")
        shots.append(np.asarray(picture))
    noise = np.random.default_rng(0).integers(0, 256, shots[0].shape, dtype=np.uint8)
    wanted = {
        "tag": "single_object",
        "include": [{"class": "stop sign", "count": 1}],
        "prompt": "a photo of a stop sign",
    }
    return wanted, np.stack([*shots, noise])[:, None]


def _videos() -> tuple[dict[str, Any], NDArray[np.uint8]]:
    """Metadata, and videos (3, 5, 32, 32, 3)."""
    wanted = motion.Combination("circle", "red", "moving right")
    rng = np.random.default_rng(0)
    right = motion.video(wanted, rng)
    wrong = motion.video(motion.Combination("star", "green", "moving up"), rng)
    noise = rng.integers(0, 256, right.shape, dtype=np.uint8)
    return motion.caption(wanted), np.stack([right, wrong, noise])


def _check_gradient(name: str, reward: Reward, media: Media, prompts: Prompts) -> None:
    value = reward(media, prompts)
    slope = None
    if isinstance(value, torch.Tensor) and value.requires_grad:
        (slope,) = torch.autograd.grad(value.sum(), media.pixels, allow_unused=True)
    if slope is None:
        raise Fault(f"reward {name}: is declared differentiable and has no gradient to the pictures")
    if not slope.isfinite().all() or not slope.any():
        raise Fault(f"reward {name}: its gradient to the pictures is zero or not finite")
