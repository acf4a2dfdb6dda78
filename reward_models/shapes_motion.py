"""Verdicts on videos of one moving shape, from the exact detector: gold and training signal of shapes-wan."""

from __future__ import annotations

from diffalign.rewards.base import to_uint8
from diffalign.shapes import motion
from diffalign.types import Media, Prompts

REWARDS = {
    "shapes_motion": {
        "object": "official",
        "differentiable": False,
        "background": True,
        "modality": "video",
        "needs": ["include", "motion"],
        "about": "every frame shows just the wanted shape and it moves as asked, 0 or 1 (gold)",
        "known": (1, 0, 0),
    },
    "shapes_motion_partial": {
        "object": "partial",
        "differentiable": False,
        "background": True,
        "modality": "video",
        "needs": ["include", "motion"],
        "about": "half for the shape and colour in the frames, half for the way it goes, in [0, 1]: a training signal",
        "known": (1, 0, 0),
    },
}


def official(media: Media, prompts: Prompts) -> list[float]:
    """1 where every frame and the motion are as asked, else 0."""
    pairs = zip(to_uint8(media), prompts.metadata, strict=True)
    return [float(motion.official(frames, wanted).correct) for frames, wanted in pairs]


def partial(media: Media, prompts: Prompts) -> list[float]:
    """Mean of the credit for what the frames show and for how it moves, in [0, 1]."""
    pairs = zip(to_uint8(media), prompts.metadata, strict=True)
    return [motion.partial(frames, wanted) for frames, wanted in pairs]
