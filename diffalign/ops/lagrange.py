"""One leap over several steps of a deterministic sampler, from the predictions at a few of them (FlowBP-Lagrange, arXiv 2606.11075).

A sampler without noise solves dx/dsigma = v for velocities, and for other predictions, with y = x / alpha and lambda = sigma / alpha,
dy/dlambda = n, the noise that the prediction implies; a step of it is Euler's. Putting the polynomial through the slopes at some nodes
under the integral gives a leap that is exact where the slope is a polynomial of a degree below their number. One node: Euler's step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.polynomial import Polynomial

from diffalign.ops import prediction
from diffalign.types import Floats


def weights(nodes: Floats, start: float, stop: float) -> Floats:
    """w (n,): integrals from start to stop of the Lagrange basis on n different nodes; sum_m w_m f(node_m) ~ that of f."""
    # On [0, 1], where no power of a node is large.
    at = (nodes - start) / (stop - start)
    found = []
    for m, node in enumerate(at):
        others = np.delete(at, m)
        basis = Polynomial.fromroots(others) if len(others) else Polynomial([1.0])
        integral = basis.integ()
        found.append((integral(1.0) - integral(0.0)) / np.prod(node - others))
    return (stop - start) * np.array(found)


def leap(alpha: Floats, sigma: Floats, kind: str, nodes: Sequence[int], stop: int) -> tuple[float, Floats, Floats]:
    """A, X (n,), P (n,) of the leap from the first of n rising nodes to level `stop`: x' = A x_start + sum_m (X_m x_m + P_m p_m).

    alpha, sigma: levels (T+1,); kind: of the predictions p_m at latents x_m; nodes: levels below `stop`.

    Raises:
        ValueError: for another prediction than velocity at a level without signal, where lambda is infinite.
    """
    at, first = list(nodes), nodes[0]
    if kind == "velocity":
        return 1.0, np.zeros(len(at)), weights(sigma[at], sigma[first], sigma[stop])
    if (alpha[at] == 0).any():
        raise ValueError("a level without signal has no sigma / alpha")
    ratio = sigma / np.where(alpha == 0, np.nan, alpha)
    w = alpha[stop] * weights(ratio[at], ratio[first], ratio[stop])
    *_, noise_x, noise_p = prediction.parts(alpha[at], sigma[at], kind)
    return float(alpha[stop] / alpha[first]), w * noise_x, w * noise_p


def spread(steps: range, count: int) -> list[int]:
    """At most `count` different steps of a range, its first among them, evenly spread over it to its last."""
    if count == 1:
        return [steps[0]]
    return sorted({steps[round(k)] for k in np.linspace(0, len(steps) - 1, min(count, len(steps)))})
