"""Rectified-flow samplers: Flow-SDE (Flow-GRPO, arXiv 2505.05470), Dance-SDE (DanceGRPO, arXiv 2505.07818) and the ODE.

With t = sigma_i, dt = sigma_{i+1} - sigma_i < 0, velocity v and diffusion coefficient g, all three are

    mean = x (1 + g^2 dt / (2 t)) + v (1 + g^2 (1 - t) / (2 t)) dt,    std = g sqrt(-dt)

and share the ODE's marginals in the limit of small steps.
"""

from __future__ import annotations

import numpy as np

from diffalign.processes.table import Levels, Table
from diffalign.types import Floats


def _table(sigma: Floats, g: Floats) -> Table:
    t, dt = sigma[:-1], np.diff(sigma)
    return Table(
        x=1 + g**2 * dt / (2 * t),
        prediction=(1 + g**2 * (1 - t) / (2 * t)) * dt,
        std=g * np.sqrt(-dt),
    )


def table(levels: Levels, noise_level: float) -> Table:
    """Flow-SDE: g = a sqrt(t / (1 - t)), where at t = 1 the t in (1 - t) is replaced by the next level.

    Args:
        levels: of a rectified flow, T+1 of them.
        noise_level: a >= 0; the paper's default is 0.7.
    """
    sigma = levels.sigma
    t = sigma[:-1]
    below_one = np.where(t == 1, sigma[1], t)
    return _table(sigma, noise_level * np.sqrt(t / (1 - below_one)))


def dance_table(levels: Levels, noise_level: float) -> Table:
    """Dance-SDE: constant g = eta; the paper's default is 0.3 for images."""
    return _table(levels.sigma, np.full(len(levels.sigma) - 1, noise_level))


def ode_table(levels: Levels, noise_level: float = 0.0) -> Table:
    """Euler steps of the probability-flow ODE: g = 0. The noise level has no effect."""
    return _table(levels.sigma, np.zeros(len(levels.sigma) - 1))
