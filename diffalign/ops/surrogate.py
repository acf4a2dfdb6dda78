"""The clipped surrogate of PPO (arXiv 1707.06347, eq. 7), as used by DDPO and Flow-GRPO."""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.ops.shapes import same


def clipped(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """Per-sample loss max(-A r, -A clip(r, 1 - c, 1 + c)) with r = exp(log_ratio); all shapes (N,)."""
    same(log_ratio=log_ratio, advantage=advantage)
    ratio = log_ratio.exp()
    # L = max(-A r, -A clip(r, 1 - c, 1 + c)): no gradient once r has moved past the range in A's direction
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


def kept(log_ratio: Tensor, advantage: Tensor, rows: Tensor) -> Tensor:
    """Per-sample loss -A r of some rows, a boolean (N,), and exactly 0, with no gradient, of the others; all shapes (N,)."""
    same(log_ratio=log_ratio, advantage=advantage)
    # Before the exponential: where it overflows, 0 times its slope is no number.
    ratio = torch.where(rows, log_ratio, 0.0).exp()
    return torch.where(rows, -(advantage * ratio), 0.0)


def clip_fraction(log_ratio: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Shares of samples whose ratio is below 1 - clip and above 1 + clip."""
    ratio = log_ratio.exp()
    return (ratio < 1 - clip).float().mean(), (ratio > 1 + clip).float().mean()
