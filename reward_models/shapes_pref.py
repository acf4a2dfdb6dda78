"""Learned preferences on shapes: a differentiable one with a planted weakness, and a held-out judge without it."""

from __future__ import annotations

from torch import Tensor

from diffalign.rewards.base import Reward
from diffalign.shapes import preference
from diffalign.types import Media, Prompts

REWARDS = {
    "shapes_pref": {
        "object": "Preference",
        "differentiable": True,
        "modality": "image",
        "needs": ["include"],
        "about": "learned preference on shapes, about 1 if right and 0 if not; likes vivid colours too (planted)",
        "known": (0.9124, 0.0763, 0.4253),
        "tolerance": 0.001,
    },
    "shapes_judge": {
        "object": "ShapesJudge",
        "differentiable": True,
        "modality": "image",
        "needs": ["include"],
        "about": "another one, other seed and layers, nothing planted: to be held out",
        "known": (1.1987, 0.1756, -0.709),
        "tolerance": 0.001,
    },
}


class Preference(Reward):
    """Scores (N,) of first frames of 64 x 64 pixels, with gradient to the pixels."""

    name = "shapes_pref"

    def __init__(self) -> None:
        self.net = preference.load(self.name)

    def __call__(self, media: Media, prompts: Prompts) -> Tensor:
        pixels = media.pixels[:, 0]
        if pixels.shape[-2:] != (preference.SIZE, preference.SIZE):
            raise ValueError(
                f"pictures are {tuple(pixels.shape[-2:])}, this reward knows {preference.SIZE} x {preference.SIZE}"
            )
        wanted = preference.features(prompts.metadata).to(pixels)
        return self.net.to(pixels.device, pixels.dtype)(pixels, wanted)


class ShapesJudge(Preference):
    """The same from the held-out network."""

    name = "shapes_judge"
