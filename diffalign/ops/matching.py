"""The forward process of rectified flow: noised samples and velocity targets."""

from __future__ import annotations

from torch import Tensor


def noised(x0: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """x_t = (1 - t) x_0 + t n for x0, noise (N, D...) and time (N,) in [0, 1] (arXiv 2209.03003)."""
    t = time.reshape(-1, *[1] * (x0.ndim - 1)).to(x0)
    return (1 - t) * x0 + t * noise


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """The target v = n - x_0."""
    return noise - x0
