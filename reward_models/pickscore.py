"""PickScore v1 (Pick-a-Pic, arXiv 2305.01569): a CLIP ViT-H/14 fine-tuned on what people picked."""

from __future__ import annotations

from torch import Tensor

from diffalign.rewards.base import Reward
from diffalign.types import Media, Prompts
from reward_models import _clip

REWARDS = {
    "pickscore": {
        "object": "PickScore",
        "differentiable": True,
        "modality": "image",
        "about": "preference of Pick-a-Pic's users: exp(scale) cos(text, picture) / 26",
        "family": "Pick-a-Pic",
        "range": "usually 0.7 to 0.95",
        "memory": 3.9,
        "weights": "yuvalkirstain/PickScore_v1",
        "licence": "MIT",
        "extra": "open_clip",
        "ordered": True,
    }
}
REPO = str(REWARDS["pickscore"]["weights"])


class PickScore(_clip.Towers, Reward):
    """Scores (N,) with gradient to the pixels.

    Divided by 26 as Flow-GRPO does, which brings scores near 1; published scores are 26 times these.
    """

    def __init__(self, place: str | None = None) -> None:
        super().__init__("pickscore", REPO, place)

    def __call__(self, media: Media, prompts: Prompts) -> Tensor:
        cosine = self.cosine(media.pixels[:, 0].float(), prompts.text)
        return self.scale.to(cosine.device) * cosine / 26
