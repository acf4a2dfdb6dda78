"""CLIPScore: cos(text, picture) of CLIP ViT-L/14, or of another CLIP: `clipscore@openai/clip-vit-base-patch32`."""

from __future__ import annotations

from torch import Tensor

from diffalign.rewards.base import Reward
from diffalign.types import Media, Prompts
from reward_models import _clip

REWARDS = {
    "clipscore": {
        "object": "CLIPScore",
        "differentiable": True,
        "modality": "image",
        "about": "cosine between text and picture, not multiplied and not cut off",
        "family": "CLIP",
        "range": "-1 to 1, usually 0.2 to 0.35",
        "memory": 1.7,
        "weights": "openai/clip-vit-large-patch14",
        "licence": "MIT",
        "extra": "open_clip",
        "ordered": True,
    }
}
REPO = str(REWARDS["clipscore"]["weights"])


class CLIPScore(_clip.Towers, Reward):
    """Scores (N,) with gradient to the pixels."""

    def __init__(self, place: str | None = None) -> None:
        super().__init__("clipscore", REPO, place)

    def __call__(self, media: Media, prompts: Prompts) -> Tensor:
        return self.cosine(media.pixels[:, 0].float(), prompts.text)
