"""How small a picture's JPEG is, as in DDPO (arXiv 2305.13301): needs no model, any pipeline can be tried with it."""

from __future__ import annotations

import io

from PIL import Image

from diffalign.rewards.base import to_uint8
from diffalign.types import Media, Prompts

REWARDS = {
    "jpeg_compressibility": {
        "object": "compressibility",
        "differentiable": False,
        "background": True,
        "modality": "image",
        "about": "minus the JPEG's size in kB (quality 95)",
        "known": (-1.42, -1.272, -5.446),
        "tolerance": 0.05,
    },
    "jpeg_incompressibility": {
        "object": "incompressibility",
        "differentiable": False,
        "background": True,
        "modality": "image",
        "about": "the JPEG's size in kB (quality 95)",
        "known": (1.42, 1.272, 5.446),
        "tolerance": 0.05,
    },
}


def incompressibility(media: Media, prompts: Prompts) -> list[float]:
    """Size of the first frame's JPEG in kB (1000 bytes), quality 95."""
    sizes = []
    for frames in to_uint8(media):
        buffer = io.BytesIO()
        Image.fromarray(frames[0]).save(buffer, format="JPEG", quality=95)
        sizes.append(buffer.tell() / 1000)
    return sizes


def compressibility(media: Media, prompts: Prompts) -> list[float]:
    """Minus `incompressibility`."""
    return [-size for size in incompressibility(media, prompts)]
