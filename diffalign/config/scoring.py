"""Keys of `scoring:`: how rewards are asked."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from diffalign.config.kinds import ASKED, FREE
from diffalign.runtime.settings import Settings


class ContrastConfig(Settings):
    """Words before a prompt, for a reward that is the difference of both."""

    plus: str = Field(min_length=1, description="words before the prompt, whose score counts")
    minus: str = Field(min_length=1, description="words before the prompt, whose score is taken away")


class ScoringConfig(Settings):
    """How rewards are asked, and when too many samples go without a score."""

    model_config = ConfigDict(json_schema_extra=FREE)

    max_invalid: float = Field(
        0.05, ge=0, le=1, description="share of an update's or evaluation's samples without a score that stops the run"
    )
    invalid_in_a_row: int = Field(10, ge=1, description="updates in a row with such samples that stop the run")
    deadline: float = Field(
        300.0, gt=0, le=1e5, description="seconds a reward server has for a batch, retries included"
    )
    batch: int = Field(16, ge=1, description="samples in a request to a reward server")
    frames: str = Field(
        "all",
        pattern=r"^(first|middle|all|uniform:[1-9]\d*|first_latent)$",
        description="of a video, for rewards that see pictures; first_latent: decode only it",
        json_schema_extra={**ASKED, "allowed": "first, middle, all, uniform:N or first_latent"},
    )
    reduce: Literal["mean", "min"] = Field("mean", description="over those frames", json_schema_extra=ASKED)
    contrast: dict[str, ContrastConfig] = Field(
        {},
        description="reward: {plus: words, minus: words}: in training its score of plus and the prompt less that of minus and it",
        json_schema_extra=ASKED,
    )
    probe: bool = Field(
        True, description="try rewards in other trainers' forms on two samples first; false: where calls cost money"
    )
