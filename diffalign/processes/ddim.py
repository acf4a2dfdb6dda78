"""DDIM with any eta (arXiv 2010.02502, eq. 12 and 16), for networks that predict epsilon, v or x_0.

With step t -> s, abar = alpha^2 and the x_0 and n that the prediction implies,

    std^2 = eta^2 (1 - abar_s) / (1 - abar_t) (1 - abar_t / abar_s)
    mean  = sqrt(abar_s) x_0 + sqrt(1 - abar_s - std^2) n

eta = 1 is DDPM's posterior, eta = 0 is deterministic.
"""

from __future__ import annotations

import numpy as np

from diffalign.processes.table import Levels, Table


def table(levels: Levels, noise_level: float) -> Table:
    """DDIM's coefficients.

    Args:
        levels: the sampler's levels, alpha^2 + sigma^2 = 1.
        noise_level: eta in [0, 1].
    """
    alpha_t, sigma_t = levels.alpha[:-1], levels.sigma[:-1]
    alpha_s, sigma_s = levels.to
    std = noise_level * (sigma_s / sigma_t) * np.sqrt(1 - (alpha_t / alpha_s) ** 2)
    direction = np.sqrt(sigma_s**2 - std**2)
    clean_x, clean_p, noise_x, noise_p = levels.parts()
    return Table(
        x=alpha_s * clean_x + direction * noise_x,
        prediction=alpha_s * clean_p + direction * noise_p,
        std=std,
    )
