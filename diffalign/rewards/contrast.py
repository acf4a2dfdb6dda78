"""A reward as the difference of what it gives a picture for two forms of its prompt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffalign.rewards.base import Reward, Wrapped, numbers
from diffalign.types import Media, Prompts


class Contrast(Wrapped):
    """r(picture, "plus prompt") - r(picture, "minus prompt"), the words before the prompt; after SRPO (arXiv 2509.06942).

    What a reward likes of a picture whatever is asked for falls out of it. Metadata stay the prompt's own.

    Raises:
        ValueError: when it is asked with gradient, of a reward that has not told other words apart so far: nothing is left of it.
    """

    def __init__(self, reward: Reward, plus: str, minus: str) -> None:
        super().__init__(reward, reward.background)
        self.words, self._apart = (plus, minus), plus == minus
        self.foreign, self.files = reward.foreign, reward.files
        self.recognised, self.probed = reward.recognised, reward.probed
        self.grouped, self.sizes = reward.grouped, reward.sizes

    def __call__(self, media: Media, prompts: Prompts) -> Any:
        more, less = (
            self.function(media, replace(prompts, text=[f"{words} {text}" for text in prompts.text]))
            for words in self.words
        )
        if isinstance(more, Tensor) and isinstance(less, Tensor):
            self._apart = self._apart or not torch.equal(more, less)
            if more.requires_grad and not self._apart:
                raise ValueError(
                    "scoring.contrast: gives pictures the same score for both words: it does not look at the prompt's text"
                )
            return more - less
        return numbers(more, len(prompts)) - numbers(less, len(prompts))
