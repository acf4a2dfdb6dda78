"""Soft-TIFA (GenEval 2, arXiv 2512.16853): how likely a vision-language model gives the right answers to questions about a picture.

A prompt's metadata say them: "questions": [{"question": "How many cows are in the image?", "answer": "three", "skill": "count"}, ...].
Comparable with published numbers are those of Qwen3-VL 8B on GenEval 2's own questions.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from diffalign.ops import soft_tifa
from diffalign.types import Media, Prompts
from reward_models._asking import Asking
from reward_models._first_token import FirstToken, Question

REWARDS = {
    "soft_tifa": {
        "object": "Geometric",
        "differentiable": True,
        "modality": "image",
        "needs": ["questions"],
        "about": "geometric mean of the right answers' probabilities over a prompt's questions: one wrong answer fails it",
        "range": "0 to 1",
        "memory": 16.3,
        "kept": 2.3,
        "weights": "Qwen/Qwen3-VL-8B-Instruct",
        "licence": "Apache-2.0",
        "family": "zero-shot VLM",
        "ordered": True,
    },
    "soft_tifa_am": {
        "object": "Arithmetic",
        "differentiable": True,
        "modality": "image",
        "needs": ["questions"],
        "about": "their arithmetic mean: about the share of what is right",
        "range": "0 to 1",
        "memory": 16.3,
        "kept": 2.3,
        "weights": "Qwen/Qwen3-VL-8B-Instruct",
        "licence": "Apache-2.0",
        "family": "zero-shot VLM",
        "ordered": True,
    },
}
REPO = str(REWARDS["soft_tifa"]["weights"])
SHORT = "Answer in one word."


class Geometric(Asking):
    """Scores (N,) with gradient to the pixels."""

    name: ClassVar[str] = "soft_tifa"

    def __init__(self, place: str | None = None, quantize: str = "none") -> None:
        self.model = FirstToken.load(self.name, REPO, place, quantize)

    def __call__(self, media: Media, prompts: Prompts) -> Tensor:
        return self.means(media, prompts)[0]

    def means(self, media: Media, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Geometric and arithmetic means (N,)."""
        log_p, rows = self.answers(media, prompts)
        return soft_tifa.means(log_p, rows, len(prompts))

    def answers(self, media: Media, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """log P (Q,) of the right answers to all questions, sample by sample in their order, and each one's sample (Q,)."""
        questions = [
            Question(row, f"{asked['question']} {SHORT}", (soft_tifa.spellings(asked["answer"]),))
            for row, metadata in enumerate(prompts.metadata)
            for asked in metadata["questions"]
        ]
        log_p = self.model.ask(media.pixels[:, :1], questions)[:, 0]
        return log_p, torch.tensor([question.picture for question in questions], device=log_p.device)


class Arithmetic(Geometric):
    """The same with arithmetic means."""

    name = "soft_tifa_am"

    def __call__(self, media: Media, prompts: Prompts) -> Tensor:
        return self.means(media, prompts)[1]
