"""HPSv2 and HPSv2.1 (arXiv 2306.09341): open_clip's ViT-H-14 with fine-tuned weights. Their scores are not comparable.

The package `hpsv2` pins old versions of half the world and reads its 2 GB file again for every picture; its formula is
the cosine, without a factor. Pictures: longest side to 224, black to a square. Its resizing has antialiasing or not with the
version of torchvision; here it always has.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.rewards.base import Reward
from diffalign.types import Media, Prompts
from reward_models import _clip

REWARDS = {
    "hpsv2": {
        "object": "HPSv2",
        "differentiable": True,
        "modality": "image",
        "about": "human preference, version 2.0: cos(text, picture)",
        "family": "HPD",
        "range": "-1 to 1, usually 0.2 to 0.3",
        "memory": 3.9,
        "weights": "xswu/HPSv2",
        "licence": "Apache-2.0",
        "extra": "open_clip",
        "ordered": True,
    },
    "hpsv2.1": {
        "object": "HPSv21",
        "differentiable": True,
        "modality": "image",
        "about": "human preference, version 2.1: cos(text, picture)",
        "family": "HPD",
        "range": "-1 to 1, usually 0.2 to 0.35",
        "memory": 3.9,
        "weights": "xswu/HPSv2",
        "licence": "Apache-2.0",
        "extra": "open_clip",
        "ordered": True,
    },
}
REPO = str(REWARDS["hpsv2"]["weights"])


class HPSv2(Reward):
    """Scores (N,) with gradient to the pixels."""

    name: ClassVar[str] = "hpsv2"
    file: ClassVar[str] = "HPS_v2_compressed.pt"
    architecture: ClassVar[str] = "ViT-H-14"

    def __init__(self, place: str | None = None) -> None:
        open_clip = _clip.open_clip()
        path = _clip.fetched(self.name, place, REPO, self.file)
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        except Exception as error:  # torch's own message advises to run whatever the file holds
            raise ValueError(f"{path} is not {self.file}: no tensors under state_dict") from error
        self.net = open_clip.create_model(self.architecture, pretrained=None).requires_grad_(False).eval()
        try:
            self.net.load_state_dict(weights)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"{path} does not hold the weights of a {self.architecture}") from error

    def problems(self) -> list[str]:
        """What looks wrong with its weights."""
        return _clip.untrained(self.net.logit_scale.exp())

    def networks(self) -> list[torch.nn.Module]:
        """What may be moved between uses."""
        return [self.net]

    def checkpoint(self) -> None:
        """Keep only the inputs of layers for the gradient."""
        _clip.checkpointed(self.net.visual.transformer.resblocks)

    def __call__(self, media: Media, prompts: Prompts) -> Tensor:
        return self.score(media.pixels[:, 0].float(), prompts.text)

    def score(self, pixels: Tensor, texts: list[str]) -> Tensor:
        """cos(text, picture) of pixels (N, 3, H, W) in [0, 1], (N,)."""
        net = self.net.to(pixels.device)
        size = net.visual.image_size[0]
        pictures = net.encode_image(_clip.normalised(_clip.pad(pixels, size)))
        with torch.no_grad():
            words = _clip.once(texts, lambda t: net.encode_text(_clip.tokens(t, net.context_length).to(pixels.device)))
        return (F.normalize(_clip.wide(pictures), dim=-1) * words).sum(1)


class HPSv21(HPSv2):
    """The same with the weights of version 2.1."""

    name = "hpsv2.1"
    file = "HPS_v2.1_compressed.pt"
