"""LAION's aesthetic predictor v2 (improved-aesthetic-predictor, sac+logos+ava1-l14-linearMSE): five linear layers on CLIP ViT-L/14."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from diffalign.rewards.base import Reward
from diffalign.types import Media, Prompts
from reward_models import _clip

REWARDS = {
    "aesthetic": {
        "object": "Aesthetic",
        "differentiable": True,
        "modality": "image",
        "about": "LAION aesthetic v2: how people liked such pictures; does not look at the prompt",
        "family": "LAION aesthetics",
        "range": "1 to 10, base models about 5 to 6",
        "weights": "openai/clip-vit-large-patch14 and trl-lib/ddpo-aesthetic-predictor",
        "licence": "MIT and Apache-2.0",
        "memory": 1.7,
        "extra": "open_clip",
    }
}
CLIP, HEAD = "openai/clip-vit-large-patch14", ("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")
FILES = ("sac+logos+ava1-l14-linearMSE.pth", HEAD[1])  # as its authors and as the hub name the same weights


class Aesthetic(_clip.Towers, Reward):
    """Scores (N,) with gradient to the pixels. PLACE is a folder with a CLIP as the hub lays it out and one of `FILES`."""

    def __init__(self, place: str | None = None) -> None:
        super().__init__("aesthetic", CLIP, place)
        path = self._head(place)
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True)
            self.head = _clip.head(weights)
        except Exception as error:  # torch's own message advises to run whatever the file holds
            raise ValueError(f"{path} is not {FILES[0]}: it lacks its five layers") from error

    def _head(self, place: str | None) -> str:
        if place is None:
            return _clip.fetched("aesthetic", None, *HEAD)
        found = [path for file in FILES if (path := Path(place) / file).is_file()]
        if not found:
            raise FileNotFoundError(f"{place} holds neither {FILES[0]} nor {FILES[1]}")
        return str(found[0])

    def __call__(self, media: Media, prompts: Prompts) -> Tensor:
        return _clip.through(self.head, self.image(media.pixels[:, 0].float()))
