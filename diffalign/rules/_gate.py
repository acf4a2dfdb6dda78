"""A divergence on the samples that are likeliest to trick the trained reward alone (GARDO, arXiv 2512.24138).

Held are those that the trained rewards like and others do not, by win rates within their group. The released code takes ranks whose best is
1, so that it holds what the trained reward *under*rates, and takes them over all prompts, so that it holds easy prompts; here neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from diffalign.runtime.settings import Settings
from diffalign.types import Floats, Integers, Scores, rows_by_group

LEAST, MOST = 0.02, 0.2  # of a share that adapts
PAST = 20  # updates that it is held against
STEP = 0.1  # how much it moves by


class GateSettings(Settings):
    """Keys of `kl_gate:`."""

    share: float = Field(0.1, gt=0, le=1, description="of an update's samples, at the beginning; 1: all of them")
    by: list[str] = Field(min_length=1, description="rewards of weight 0 that the trained ones are held against")
    adapt: bool = Field(
        True, description=f"the share moves in [{LEAST:g}, {MOST:g}]: up while more is overrated, down while less"
    )


@dataclass(frozen=True)
class Gate:
    """What a gate has learnt: the share that it holds now, and the mean overrating of the last updates."""

    share: float
    past: tuple[float, ...] = ()

    def after(self, mean: float) -> Gate:
        """After an update whose overrated samples were so by `mean`: the share grows above all of the last 20, and shrinks below them."""
        share = self.share
        if self.past and (mean > max(self.past) or mean < min(self.past)):
            share *= 1 + STEP if mean > max(self.past) else 1 - STEP
        return Gate(min(MOST, max(LEAST, share)), (*self.past, mean)[-PAST:])


def win_rates(values: Floats, group: Integers, valid: NDArray[np.bool_]) -> Floats:
    """The share of the other valid samples of its group (N,) that each one beats, an equal one counted as half; 0.5 where it is alone, or
    not valid."""
    found = np.full(len(values), 0.5)
    for rows in rows_by_group(group, valid):
        own = values[rows]
        if len(rows) > 1:
            beaten = (own[:, None] > own).sum(1) + ((own[:, None] == own).sum(1) - 1) / 2
            found[rows] = beaten / (len(rows) - 1)
    return found


def overrated(scores: Scores, by: Sequence[str], group: Integers) -> Floats:
    """How much more the trained rewards like each sample (N,) than others do: a difference of win rates, in [-1, 1]."""
    others = [win_rates(scores.by_name[name], group, scores.valid) for name in by]
    return win_rates(scores.total, group, scores.valid) - np.mean(others, 0)


def held(apart: Floats, share: float) -> Floats:
    """What each sample's divergence weighs: 1 / share for the share of all that is overrated most, at all, and 0 for others.

    So a mean over any rows, taken over all of them, is of one weight however they are cut. A share of 1 holds every sample.
    """
    if share == 1:
        return np.ones(len(apart))
    most = np.argsort(-apart, kind="stable")[: max(1, round(share * len(apart)))]
    found = np.zeros(len(apart))
    found[most] = np.where(apart[most] > 0, 1 / share, 0.0)
    return found
