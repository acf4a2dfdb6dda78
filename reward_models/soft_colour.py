"""An analytic, differentiable colour reward that is easy to cheat: the tutorial's picture of reward hacking."""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.shapes.world import BACKGROUND, COLOURS, PALETTE
from diffalign.types import Media, Prompts

REWARDS = {
    "soft_colour": {
        "object": "soft_colour",
        "differentiable": True,
        "modality": "image",
        "needs": ["include"],
        "about": "share of wanted colours and of background, in [0, 2]; hackable by design: shapes do not count",
        "known": (1.6581, 0.8968, 0.2117),
        "tolerance": 0.001,
    },
}
TAU = 0.1  # in squared RGB distance, channels in [0, 1]: smaller and a grey picture has no gradient, larger and all is alike


def soft_colour(media: Media, prompts: Prompts) -> Tensor:
    """Purity of colour plus share of background, (N,) in [0, 2], of first frames.

    With p(pixel) = softmax(-|rgb - c|^2 / tau) over six colours and the background, purity = sum p(wanted) / sum p(colours).
    Captions that name no colour want all of them.
    """
    pixels = media.pixels[:, 0]
    anchors = pixels.new_tensor([*PALETTE.values(), BACKGROUND]) / 255
    distance = ((pixels[:, None] - anchors[None, :, :, None, None]) ** 2).sum(2)
    mass = torch.softmax(-distance / TAU, 1).mean((2, 3))
    named = [{clause.get("color") for clause in m["include"]} for m in prompts.metadata]
    wanted = pixels.new_tensor([[float(c in names or names == {None}) for c in COLOURS] for names in named])
    colours = mass[:, : len(COLOURS)]
    return (colours * wanted).sum(1) / colours.sum(1) + mass[:, -1]
