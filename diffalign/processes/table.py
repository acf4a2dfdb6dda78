"""What a process is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Table:
    """Coefficients of every step, (T,) float64: mean = x * latent + prediction * network output; std of the noise."""

    x: Floats
    prediction: Floats
    std: Floats


@dataclass(frozen=True)
class Process:
    """kind: of the scheduler's levels ("flow": alpha = 1 - sigma); table(sigma (T+1,), noise level) -> Table."""

    kind: Literal["flow"]
    table: Callable[[Floats, float], Table]
    stochastic: bool


def linear_sigmas(steps: int) -> list[float]:
    """Evenly spaced noise levels from 1, without the final 0, as `sigmas=` of a pipeline's call wants them."""
    return np.linspace(1.0, 0.0, steps + 1)[:-1].tolist()


def check_levels(sigma: Floats) -> None:
    """Raises ValueError unless noise levels fall strictly within [0, 1]."""
    if sigma.ndim != 1 or len(sigma) < 2 or not (np.diff(sigma) < 0).all() or sigma[0] > 1 or sigma[-1] < 0:
        raise ValueError(f"noise levels must fall strictly within [0, 1], got {sigma}")
