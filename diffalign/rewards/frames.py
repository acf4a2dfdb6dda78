"""Rewards for pictures on videos: which frames they see, and how their scores become one."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign.rewards.base import Reward, Wrapped, numbers
from diffalign.types import Integers, Media, Prompts

POLICY = re.compile(r"first_latent|first|middle|all|uniform:([1-9]\d*)")


def chosen(policy: str, count: int) -> Integers:
    """Indices of the frames of `count` that a policy shows: first, middle, all, uniform:N (N of them, both ends included), or first_latent,
    the first, which is all there is of a video where its first latent alone was decoded.

    Raises:
        ValueError: for another policy.
    """
    match = POLICY.fullmatch(policy)
    if match is None:
        raise ValueError(f"got {policy!r}, allowed are first, middle, all, uniform:N and first_latent")
    if match.group(1):
        return np.unique(np.linspace(0, count - 1, min(int(match.group(1)), count)).round().astype(np.int64))
    return {
        "first": np.arange(1),
        "first_latent": np.arange(1),
        "middle": np.array([count // 2]),
        "all": np.arange(count),
    }[policy]


class PerFrame(Wrapped):
    """A reward for pictures that takes videos: `frames` is a policy, `reduce` mean or min over the frames seen."""

    def __init__(self, reward: Reward, frames: str = "all", reduce: str = "mean") -> None:
        super().__init__(reward)
        self.reward, self.frames, self.reduce = reward, frames, reduce

    def __call__(self, media: Media, prompts: Prompts) -> Any:
        count = media.pixels.shape[1]
        if count == 1:
            return self.reward(media, prompts)
        seen = chosen(self.frames, count)
        pixels = media.pixels[:, torch.from_numpy(seen).to(media.pixels.device)]
        rows = np.repeat(np.arange(len(prompts)), len(seen))
        values = self.reward(Media(pixels.flatten(0, 1)[:, None], media.fps), prompts.select(rows))
        if not isinstance(values, Tensor):
            values = torch.as_tensor(numbers(values, len(rows)))
        by_frame = values.reshape(len(prompts), len(seen))
        return by_frame.mean(1) if self.reduce == "mean" else by_frame.amin(1)
