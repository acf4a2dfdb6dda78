"""DPM-Solver++ (2M), a deterministic solver with memory of one step (arXiv 2211.01095, algorithm 2, midpoint form).

From level s to level t, with lambda = log(alpha / sigma), h = lambda_t - lambda_s, h' the step before it, and the clean samples x_0
and x_0' that the prediction of this step and of the one before imply,

    x_t = sigma_t / sigma_s x_s + (alpha_t - alpha_s sigma_t / sigma_s) D,    D = (1 + r) x_0 - r x_0',    r = h / (2 h')

(alpha_t - alpha_s sigma_t / sigma_s is the paper's -alpha_t (e^-h - 1), finite where sigma_t is 0.) The first step has no step
before it, and the last one may end at sigma = 0, where h is infinite: they have r = 0, which for a flow is Euler's step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffalign.processes.table import Levels
from diffalign.types import Floats


@dataclass(frozen=True)
class Jumps:
    """Coefficients of the steps a solver takes, (S,) float64: x_t = x * latent + prediction * network output + past * x_0 of the
    step before; of this step's x_0 in the latent and the network output: clean_x, clean_prediction."""

    x: Floats
    prediction: Floats
    past: Floats
    clean_x: Floats
    clean_prediction: Floats


def jumps(levels: Levels, steps: Sequence[int]) -> Jumps:
    """The coefficients of stepping from each of some levels to the next one, from the last to the end.

    Args:
        levels: the sampler's, T+1 of them.
        steps: rising indices below T.
    """
    start = np.asarray(steps)
    stop = np.append(start[1:], len(levels.sigma) - 1)
    with np.errstate(divide="ignore"):
        snr = np.log(levels.alpha) - np.log(levels.sigma)  # -inf at alpha = 0, inf at sigma = 0
    h = snr[stop] - snr[start]
    r = np.zeros(len(start))
    r[1:-1] = h[1:-1] / (2 * h[:-2])
    ratio = levels.sigma[stop] / levels.sigma[start]
    gain = levels.alpha[stop] - levels.alpha[start] * ratio
    clean_x, clean_prediction = (column[start] for column in levels.parts()[:2])
    return Jumps(
        x=ratio + gain * (1 + r) * clean_x,
        prediction=gain * (1 + r) * clean_prediction,
        past=-gain * r,
        clean_x=clean_x,
        clean_prediction=clean_prediction,
    )
