"""How far a sample is from the others of its prompt. It does not look at the prompt, and noise and broken pictures are far apart too."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import torch
from torch import Tensor

from diffalign.rewards import distances
from diffalign.rewards.base import Reward, to_uint8
from diffalign.rewards.frames import chosen
from diffalign.types import Floats, Media, Prompts
from reward_models import _clip

REWARDS = {
    "diversity": {
        "object": "Thumbnails",
        "differentiable": False,
        "modality": "any",
        "about": "root mean square distance of thumbnails to the others of a prompt, as `pictures/diversity`; does not look at the prompt",
        "range": "0 to 1, usually 0.1 to 0.4",
        "known": (0.3492, 0.3467, 0.4384),
        "tolerance": 1e-3,
    },
    "diversity_clip": {
        "object": "Features",
        "differentiable": False,
        "modality": "any",
        "about": "1 - cosine of CLIP's features to the others of a prompt, of four of a video's frames; does not look at the prompt",
        "family": "CLIP",
        "range": "0 to 2, usually 0.05 to 0.4",
        "memory": 1.7,
        "weights": "openai/clip-vit-large-patch14",
        "licence": "MIT",
    },
}
REPO = str(REWARDS["diversity_clip"]["weights"])
FRAMES = "uniform:4"


class _Apart(Reward):
    """Scores (N,): each sample's mean distance to the others of its group."""

    grouped = True

    def __call__(self, media: Media, prompts: Prompts) -> list[float]:
        found = np.full(len(prompts), np.nan)
        for rows in self.groups(prompts):
            found[rows] = self.apart(media.pixels[torch.from_numpy(rows).to(media.pixels.device)])
        return found.tolist()

    @abstractmethod
    def apart(self, pixels: Tensor) -> Floats:
        """Mean distances (n,) of one group's samples (n, F, 3, H, W)."""


class Thumbnails(_Apart):
    """Of thumbnails, see `distances`."""

    def apart(self, pixels: Tensor) -> Floats:
        return distances.diversity(distances.thumbnails(to_uint8(Media(pixels))), np.zeros(len(pixels), np.int64))


class Features(_clip.Towers, _Apart):
    """Of CLIP's embeddings, frame by frame."""

    def __init__(self, place: str | None = None) -> None:
        super().__init__("diversity_clip", REPO, place)

    def apart(self, pixels: Tensor) -> Floats:
        seen = pixels[:, torch.from_numpy(chosen(FRAMES, pixels.shape[1])).to(pixels.device)].float()
        embedded = torch.stack([self.image(frame) for frame in seen.unbind(1)], 1).double()  # (n, F, D)
        apart = 1 - torch.einsum("ifd,jfd->ij", embedded, embedded) / seen.shape[1]
        apart.fill_diagonal_(0)
        return (apart.sum(1) / (len(pixels) - 1)).cpu().numpy()
