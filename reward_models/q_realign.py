"""Q-ReAlign (github.com/Q-Future/Q-ReAlign): how a picture or a clip looks, in the five words that a Qwen3.5 was trained to say.

The answer's beginning is given, and the score is the mean of the words' values over the softmax of their first tokens. The model was
trained on several wordings of a question; this is always the one below. Clips are shown as eight uniform frames. It does not see the
prompt: a floor under another reward, never the only one.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from diffalign.rewards.frames import chosen
from diffalign.types import Media, Prompts
from reward_models._asking import Asking
from reward_models._first_token import FirstToken, Question

REWARDS = {
    "q_realign": {
        "object": "Quality",
        "differentiable": True,
        "modality": "any",
        "about": "technical quality in five words, by a judge trained on people's ratings; does not look at the prompt",
        "range": "0 to 1",
        "memory": 1.6,
        "weights": "q-future/Q-ReAlign-Mini-0.8B",
        "licence": "code MIT, weights not read",
        "family": "IQA",
    },
    "q_realign_aesthetic": {
        "object": "Aesthetic",
        "differentiable": True,
        "modality": "any",
        "about": "the same judge asked about aesthetics, of a video's frames as pictures; does not look at the prompt",
        "range": "0 to 1",
        "memory": 1.6,
        "weights": "q-future/Q-ReAlign-Mini-0.8B",
        "licence": "code MIT, weights not read",
        "family": "IQA",
    },
}
REPO = str(REWARDS["q_realign"]["weights"])
VALUES = {"excellent": 1.0, "good": 0.75, "fair": 0.5, "poor": 0.25, "bad": 0.0}
WORDS = tuple((f" {word}",) for word in VALUES)  # after the answer's beginning each has one spelling
FRAMES = "uniform:8"


class Quality(Asking):
    """Scores (N,) with gradient to the pixels."""

    name: ClassVar[str] = "q_realign"
    about: ClassVar[str] = "quality"
    words = "its five words"

    def __init__(self, place: str | None = None) -> None:
        self.model = FirstToken.load(self.name, REPO, place)
        self.model.apart(*WORDS)

    def __call__(self, media: Media, prompts: Prompts) -> Tensor:
        return self.score(*self.shown(media))

    def shown(self, media: Media) -> tuple[Tensor, str]:
        """Pixels (N, F, 3, H, W), and what they are called."""
        count = media.pixels.shape[1]
        if count == 1:
            return media.pixels, "image"
        return media.pixels[:, torch.from_numpy(chosen(FRAMES, count)).to(media.pixels.device)], "video"

    def score(self, pixels: Tensor, kind: str) -> Tensor:
        """Scores (N,) of pixels (N, F, 3, H, W), the F frames of a row shown together."""
        text, begun = f"How would you rate the {self.about} of this {kind}?", f"The {self.about} of the {kind} is"
        log_p = self.ask(pixels, [Question(row, text, WORDS, begun) for row in range(len(pixels))])
        return log_p.softmax(-1) @ log_p.new_tensor(list(VALUES.values()))


class Aesthetic(Quality):
    """The same about aesthetics; the model knows that question of pictures only: a video has the mean of its eight frames."""

    name = "q_realign_aesthetic"
    about = "aesthetics"

    def __call__(self, media: Media, prompts: Prompts) -> Tensor:
        pixels, _ = self.shown(media)
        frames = self.score(pixels.flatten(0, 1)[:, None], "image")
        return frames.reshape(pixels.shape[:2]).mean(1)
