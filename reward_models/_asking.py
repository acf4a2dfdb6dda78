"""What rewards share that ask a vision-language model for the first token of an answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from diffalign.rewards.base import Reward
from reward_models._first_token import FirstToken, Question, said


class Asking(Reward):
    """A reward that asks a model; words: what `problems` calls the answers it chooses among, `left` went to others at the last call."""

    model: FirstToken
    words: ClassVar[str] = ""
    left: float = math.nan

    def ask(self, pixels: Tensor, questions: Sequence[Question]) -> Tensor:
        """See `FirstToken.ask`, for questions that all have the answers that `words` names."""
        log_p = self.model.ask(pixels, questions)
        self.left = 1 - float(log_p.detach().exp().sum(-1).mean())
        return log_p

    def checkpoint(self) -> None:
        """Keep only the inputs of layers for the gradient."""
        self.model.checkpoint()

    def problems(self) -> list[str]:
        """A line if the model leaves most of the first token's probability to other words than those it was asked for."""
        if math.isnan(self.left) or self.left < 0.5:
            return []
        found = f"{self.words} get {1 - self.left:.2g} of the first token's probability"
        return [f"{found}, a trained model gives them nearly all: other weights?"]

    def networks(self) -> list[torch.nn.Module]:
        """What may be moved between uses."""
        return [self.model.net]


YES_NO = (said("yes"), said("no"))


class YesNo(Asking):
    """One whose answers are yes and no. The arguments are those of `FirstToken.load`."""

    words = "yes and no"

    def __init__(self, name: str, repo: str, place: str | None, quantize: str) -> None:
        self.model = FirstToken.load(name, repo, place, quantize)
        self.model.apart(*YES_NO)

    def yes_no(self, pixels: Tensor, asked: Sequence[tuple[int, str]]) -> Tensor:
        """log P (Q, 2) of yes and of no to questions, each about a row of the pixels (N, F, 3, H, W)."""
        return self.ask(pixels, [Question(row, text, YES_NO) for row, text in asked])
