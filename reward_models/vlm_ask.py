"""P(yes) of a vision-language model in process: VQAScore (arXiv 2404.01291) on any Qwen-VL of transformers, with a gradient to the pixels.

`vlm_ask@PLACE` takes another model than Qwen3-VL 8B, `vlm_ask@PLACE;FILE` the question of a file, with {prompt} where the prompt goes.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from diffalign.rewards.frames import chosen
from diffalign.types import Media, Prompts
from reward_models._asking import YesNo

REWARDS = {
    "vlm_ask": {
        "object": "Ask",
        "differentiable": True,
        "modality": "any",
        "about": "P(yes) of a vision-language model asked whether the picture, or four of a video's frames, show the prompt",
        "range": "0 to 1",
        "memory": 16.3,
        "kept": 2.3,
        "weights": "Qwen/Qwen3-VL-8B-Instruct",
        "licence": "Apache-2.0",
        "family": "zero-shot VLM",
        "ordered": True,
    }
}
REPO = str(REWARDS["vlm_ask"]["weights"])
QUESTION = 'Does this figure show "{prompt}"? Please answer yes or no.'  # VQAScore's
FRAMES = "uniform:4"


class Ask(YesNo):
    """Scores (N,) with gradient to the pixels: the probability, over all tokens, that the answer begins with yes."""

    def __init__(self, place: str | None = None, quantize: str = "none") -> None:
        where, _, file = (place or "").partition(";")
        self.asked = Path(file).read_text(encoding="utf-8") if file else QUESTION
        if "{prompt}" not in self.asked:
            raise ValueError(f"{file} does not say where the prompt goes; allowed is a text with {{prompt}} in it")
        super().__init__("vlm_ask", REPO, where or None, quantize)

    def __call__(self, media: Media, prompts: Prompts) -> Tensor:
        frames = torch.from_numpy(chosen(FRAMES, media.pixels.shape[1])).to(media.pixels.device)
        texts = [self.asked.replace("{prompt}", text) for text in prompts.text]
        return self.yes_no(media.pixels[:, frames], list(enumerate(texts)))[:, 0].exp()
