"""How far a sample is from the others of its prompt. It does not look at the prompt, and noise and broken pictures are far apart too."""

from __future__ import annotations

import math
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
    "novelty": {
        "object": "NearestThumbnail",
        "differentiable": False,
        "modality": "any",
        "about": "1 - cosine of thumbnails, less their mean, to the nearest other of a prompt; for `rule.diversity`",
        "range": "0 to 2, usually 0.2 to 1",
        "known": (0.9605, 0.9605, 0.9926),
        "tolerance": 1e-3,
    },
    "novelty_clip": {
        "object": "NearestFeature",
        "differentiable": False,
        "modality": "any",
        "about": "1 - cosine of CLIP's features to the nearest other of a prompt, of four of a video's frames; for `rule.diversity`",
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
    """Scores (N,): how far each sample is from the others of its group."""

    grouped = True

    def __call__(self, media: Media, prompts: Prompts) -> list[float]:
        found = np.full(len(prompts), np.nan)
        for rows in self.groups(prompts):
            found[rows] = self.apart(media.pixels[torch.from_numpy(rows).to(media.pixels.device)])
        return found.tolist()

    @abstractmethod
    def apart(self, pixels: Tensor) -> Floats:
        """Distances (n,) of one group's samples (n, F, 3, H, W)."""


def _mean(between: Tensor) -> Floats:
    """Of distances (n, n) of samples, each one's mean to the others."""
    return (between.fill_diagonal_(0).sum(1) / (len(between) - 1)).cpu().numpy()


def _nearest(between: Tensor) -> Floats:
    """Of distances (n, n) of samples, each one's to the nearest other."""
    return between.fill_diagonal_(math.inf).amin(1).clamp(min=0).cpu().numpy()


class Thumbnails(_Apart):
    """Mean distance of thumbnails, see `distances`."""

    def apart(self, pixels: Tensor) -> Floats:
        return distances.diversity(distances.thumbnails(to_uint8(Media(pixels))), np.zeros(len(pixels), np.int64))


class NearestThumbnail(_Apart):
    """Cosine distance of thumbnails from which their own mean was taken: two of one colour each are as far apart as any."""

    def apart(self, pixels: Tensor) -> Floats:
        small = torch.from_numpy(distances.thumbnails(to_uint8(Media(pixels))))
        small = small - small.mean(1, keepdim=True)
        size = small.norm(dim=1, keepdim=True)
        unit = torch.where(size > 0, small / size, 0.0)
        # Of the same picture the cosine is 1 up to rounding, of an empty one 0 / 0: both are no further than that.
        same = (small[:, None] == small[None]).all(2)
        return _nearest(torch.where(same, 0.0, 1 - unit @ unit.T))


class Features(_clip.Towers, _Apart):
    """Mean distance of CLIP's embeddings, frame by frame."""

    name = "diversity_clip"

    def __init__(self, place: str | None = None) -> None:
        super().__init__(self.name, REPO, place)

    def between(self, pixels: Tensor) -> Tensor:
        """1 - cosine (n, n) of a group's samples, mean over frames."""
        seen = pixels[:, torch.from_numpy(chosen(FRAMES, pixels.shape[1])).to(pixels.device)].float()
        embedded = torch.stack([self.image(frame) for frame in seen.unbind(1)], 1).double()  # (n, F, D)
        return 1 - torch.einsum("ifd,jfd->ij", embedded, embedded) / seen.shape[1]

    def apart(self, pixels: Tensor) -> Floats:
        return _mean(self.between(pixels))


class NearestFeature(Features):
    """The same to the nearest other."""

    name = "novelty_clip"

    def apart(self, pixels: Tensor) -> Floats:
        return _nearest(self.between(pixels))
