"""A reward whose network is held in bfloat16: half the memory, and on a card a fraction of the time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign.rewards.base import Reward, Wrapped, numbers
from diffalign.types import Media, Prompts


def difference(narrow: Reward, wide: Reward, media: Media, prompts: Prompts) -> tuple[float, float]:
    """The largest difference of two rewards' scores of some samples, and the standard deviation of the second's."""
    with torch.no_grad():
        mine, theirs = (numbers(reward(media, prompts), len(prompts)) for reward in (narrow, wide))
    return float(np.abs(mine - theirs).max()), float(theirs.std())


class Narrow(Wrapped):
    """A reward in bfloat16, weights and, through autocast, products; its scores are float32.

    Scores differ from the float32 ones by the rounding of 8 binary digits, which training takes and evaluations do not: they have a copy
    of their own.
    """

    def __init__(self, reward: Reward) -> None:
        super().__init__(reward, reward.background)
        self.foreign, self.files = reward.foreign, reward.files
        self.recognised, self.probed = reward.recognised, reward.probed
        for network in reward.networks():
            network.to(torch.bfloat16)

    def __call__(self, media: Media, prompts: Prompts) -> Any:
        with torch.autocast(media.pixels.device.type, torch.bfloat16):
            scores = self.function(media, prompts)
        return scores.float() if isinstance(scores, Tensor) else scores
