"""GenEval's verdicts in the shapes world, from the exact detector: the gold reward of the embedded pipelines."""

from __future__ import annotations

from diffalign.ops import geneval
from diffalign.rewards.base import to_uint8
from diffalign.shapes.detector import Found, detect
from diffalign.types import Media, Prompts

REWARDS = {
    "shapes_geneval": {
        "object": "official",
        "differentiable": False,
        "background": True,
        "modality": "image",
        "needs": ["include"],
        "about": "GenEval's official verdict on shapes, 0 or 1 (gold)",
        "known": (1, 0, 0),
    },
    "shapes_geneval_strict": {
        "object": "strict",
        "differentiable": False,
        "background": True,
        "modality": "image",
        "needs": ["include"],
        "about": "exactly the wanted shapes and no unexplained pixels, 0 or 1",
        "known": (1, 0, 0),
    },
    "shapes_geneval_partial": {
        "object": "partial",
        "differentiable": False,
        "background": True,
        "modality": "image",
        "needs": ["include"],
        "about": "share of what the caption asks for, in [0, 1]: a training signal",
        "known": (1, 0, 0),
    },
}


def _found(media: Media) -> list[Found]:
    return [detect(frames[0]) for frames in to_uint8(media)]


def official(media: Media, prompts: Prompts) -> list[float]:
    """1 where GenEval's published rules pass, else 0."""
    pairs = zip(_found(media), prompts.metadata, strict=True)
    return [float(geneval.official(found.objects, wanted).correct) for found, wanted in pairs]


def strict(media: Media, prompts: Prompts) -> list[float]:
    """1 where the picture holds exactly what the caption asks for and nothing unexplained, else 0."""
    pairs = zip(_found(media), prompts.metadata, strict=True)
    return [float(geneval.strict(found.objects, wanted, found.residue).correct) for found, wanted in pairs]


def partial(media: Media, prompts: Prompts) -> list[float]:
    """Mean credit over counts, colours and positions, in [0, 1]."""
    pairs = zip(_found(media), prompts.metadata, strict=True)
    return [geneval.partial(found.objects, wanted) for found, wanted in pairs]
