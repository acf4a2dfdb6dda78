"""PickScore v1 (Pick-a-Pic, arXiv 2305.01569): a CLIP ViT-H/14 fine-tuned on what people picked."""

from __future__ import annotations

from torch import Tensor

from diffalign.types import Media, Prompts
from reward_models import _clip

REWARDS = {
    "pickscore": {
        "object": "PickScore",
        "differentiable": True,
        "modality": "image, video",
        "about": "preference of Pick-a-Pic's users: exp(scale) cos(text, picture) / 26, about 0.7 to 0.95",
        "weights": "yuvalkirstain/PickScore_v1",
        "licence": "MIT",
        "extra": "open_clip",
    }
}
REPO = str(REWARDS["pickscore"]["weights"])


class PickScore(_clip.Scorer):
    """Scores (N,) with gradient to the pixels; a video's is the mean over its frames.

    Divided by 26 as Flow-GRPO does, which brings scores near 1; published scores are 26 times these.
    """

    def __init__(self, place: str | None = None) -> None:
        super().__init__("pickscore", REPO, place)

    def __call__(self, media: Media, prompts: Prompts) -> Tensor:
        return self.scale.to(media.pixels.device) * _clip.per_frame(media, self.cosine, prompts.text) / 26
