"""What a network's prediction says of the clean sample and the noise: the one place where x_0 is written down.

With x_t = alpha x_0 + sigma n: velocity is n - x_0 (a rectified flow, alpha + sigma = 1), epsilon is n, v_prediction is
alpha n - sigma x_0 (arXiv 2202.00512, alpha^2 + sigma^2 = 1), sample is x_0.
"""

from __future__ import annotations

import numpy as np

from diffalign.types import Floats

KINDS = ("velocity", "epsilon", "v_prediction", "sample")


def parts(alpha: Floats, sigma: Floats, kind: str) -> tuple[Floats, Floats, Floats, Floats]:
    """Coefficients (T,) of (x_t, prediction) in x_0 and in n: x_0 = c_0 x_t + c_1 p, n = c_2 x_t + c_3 p.

    Raises:
        ValueError: for epsilon at a level without signal, and for other kinds.
    """
    one, zero = np.ones_like(alpha), np.zeros_like(alpha)
    if kind == "velocity":  # x_0 = x - s v, n = x + a v
        return one, -sigma, one, alpha
    if kind == "v_prediction":  # x_0 = a x - s v, n = s x + a v
        return alpha, -sigma, sigma, alpha
    if kind == "sample":  # n = (x - a x_0) / s
        return zero, one, 1 / sigma, -alpha / sigma
    if kind != "epsilon":
        raise ValueError(f"prediction type {kind!r}, known are {', '.join(KINDS)}")
    if (alpha == 0).any():
        raise ValueError("epsilon prediction says nothing about x_0 where alpha is 0")
    return 1 / alpha, -sigma / alpha, zero, one  # x_0 = (x - s e) / a


def arrival(at_x: float, at_prediction: float, alpha: float, sigma: float, kind: str) -> tuple[float, float]:
    """alpha' and sigma' of where a step x' = at_x x + at_prediction p without noise leads from a level: x' = alpha' x_0 + sigma' n, with
    the x_0 and n that the prediction implies."""
    clean_x, clean_p, noise_x, noise_p = parts(np.array([alpha]), np.array([sigma]), kind)
    of_both = np.array([[clean_x[0], noise_x[0]], [clean_p[0], noise_p[0]]])
    signal, noise = np.linalg.solve(of_both, np.array([at_x, at_prediction]))
    return float(signal), float(noise)
