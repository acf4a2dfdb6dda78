"""Coefficients-preserving sampling of rectified flows (arXiv 2509.05952).

With step t -> t', s = t' sin(eta pi / 2), and the x_0 and noise x_1 that the velocity implies,

    mean = (1 - t') x_0 + sqrt(t'^2 - s^2) x_1,    std = s

The coefficients of signal and noise are those of the schedule at every level, so no noise creeps into the picture; marginals are
not those of the ODE. eta = 0 is Euler, and the last step has no noise.
"""

from __future__ import annotations

import numpy as np

from diffalign.processes.table import Levels, Table


def table(levels: Levels, noise_level: float) -> Table:
    """CPS's coefficients.

    Args:
        levels: of a rectified flow, T+1 of them.
        noise_level: eta in [0, 1]; the paper's default is 0.8.
    """
    after = levels.sigma[1:]
    std = after * np.sin(noise_level * np.pi / 2)
    kept = np.sqrt(after**2 - std**2)
    clean_x, clean_p, noise_x, noise_p = levels.parts()
    return Table(
        x=(1 - after) * clean_x + kept * noise_x,
        prediction=(1 - after) * clean_p + kept * noise_p,
        std=std,
    )
