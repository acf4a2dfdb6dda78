"""What a process is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from diffalign.ops import prediction
from diffalign.types import Floats

Kind = Literal["flow", "ddpm"]
Prediction = Literal["velocity", "epsilon", "v_prediction", "sample"]


@dataclass(frozen=True)
class Levels:
    """A sampler's noise levels, alpha and sigma (T+1,) with x_t = alpha x_0 + sigma n, and what its network predicts.

    `ends`: alpha and sigma (T,) that each step leads to, where that is not where the next one begins.
    What the kinds of prediction are is said in `ops.prediction`.

    Raises:
        ValueError: unless sigma lies in [0, 1], never rises and is 0 at most at the end, and alpha never falls; for other
            predictions.
    """

    alpha: Floats
    sigma: Floats
    prediction: Prediction = "velocity"
    ends: tuple[Floats, Floats] | None = None

    @property
    def to(self) -> tuple[Floats, Floats]:
        """alpha and sigma (T,) at the end of each step."""
        return (self.alpha[1:], self.sigma[1:]) if self.ends is None else self.ends

    def __post_init__(self) -> None:
        sigma = self.sigma
        falls = sigma.ndim == 1 and len(sigma) > 1 and bool((np.diff(sigma) <= 0).all())
        if not (falls and sigma[0] <= 1 and sigma[-2] > 0 and sigma[-1] >= 0):
            raise ValueError(f"noise levels must fall within [0, 1], and be 0 only at the end, got {sigma}")
        if self.alpha.shape != sigma.shape or (np.diff(self.alpha) < 0).any():
            raise ValueError(f"signal levels must not fall, got {self.alpha}")
        if self.prediction not in get_args(Prediction):
            raise ValueError(f"prediction type {self.prediction!r}, known are {', '.join(get_args(Prediction))}")

    @classmethod
    def flow(cls, sigma: Floats) -> Levels:
        """Levels of a rectified flow: alpha = 1 - sigma."""
        return cls(1 - sigma, sigma, "velocity")

    def parts(self) -> tuple[Floats, Floats, Floats, Floats]:
        """Coefficients (T,) of each step's (x, prediction) in the clean sample x_0 and in the noise n they imply."""
        return prediction.parts(self.alpha[:-1], self.sigma[:-1], self.prediction)


@dataclass(frozen=True)
class Table:
    """Coefficients of every step, (T,) float64: mean = x * latent + prediction * network output; std of the noise."""

    x: Floats
    prediction: Floats
    std: Floats


@dataclass(frozen=True)
class Process:
    """kind: of the scheduler whose levels it walks; table(levels, noise level) -> Table; highest: noise level there is."""

    kind: Kind
    table: Callable[[Levels, float], Table]
    stochastic: bool
    highest: float = float("inf")


def linear_sigmas(steps: int) -> list[float]:
    """Evenly spaced noise levels from 1, without the final 0, as `sigmas=` of a pipeline's call wants them."""
    return np.linspace(1.0, 0.0, steps + 1)[:-1].tolist()
