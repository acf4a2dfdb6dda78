"""Isotropic Gaussians: log density, ratio and divergence. How latent dimensions are reduced is always said.

PPO-style rules average (DDPO's code, arXiv 2305.13301; a clip range of 1e-4 only makes sense that way), likelihood-ratio
estimators that are added to pathwise gradients sum.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from diffalign.ops.shapes import same
from diffalign.types import Floats

Reduce = Literal["mean", "sum"]


def reduce_latent(values: Tensor, reduce: Reduce) -> Tensor:
    """(N, D...) to (N,): mean or sum over all dimensions but the first, in float64 where the device has it.

    In float32 the sum depends on the order, which depends on the address and the CPU: the ratio of equal tensors would be off by an ulp,
    and ulps of log-probs are several per cent of the narrowest clip range, 2e-6.
    """
    wide = values.dtype if values.device.type == "mps" else torch.float64
    flat = values.flatten(1)
    if reduce == "mean":
        return flat.mean(1, dtype=wide)
    if reduce == "sum":
        return flat.sum(1, dtype=wide)
    raise ValueError(f"reduce: got {reduce!r}, allowed are mean, sum")


def like(values: Floats, other: Tensor) -> Tensor:
    """Numbers (N,) as a tensor of another's kind, on its device."""
    return torch.as_tensor(values, dtype=other.dtype, device=other.device)


def log_prob(x: Tensor, mean: Tensor, std: float, reduce: Reduce) -> Tensor:
    """log N(x; mean, std^2 I), (N, D...) to (N,).

    Raises:
        ValueError: if std is not positive (a deterministic step has no density), or shapes differ.
    """
    same(x=x, mean=mean)
    if not std > 0:
        raise ValueError(f"log_prob: std is {std}, a deterministic step has no density")
    # -(x - mu)^2 / (2 s^2) - log s - log(2 pi) / 2, per dimension
    per_dim = -((x - mean) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)
    return reduce_latent(per_dim, reduce)


def divergence(mean_p: Tensor, mean_q: Tensor, std: float, reduce: Reduce) -> Tensor:
    """KL(N(mean_p, std^2) || N(mean_q, std^2)) = (mean_p - mean_q)^2 / (2 std^2), (N, D...) to (N,)."""
    same(mean_p=mean_p, mean_q=mean_q)
    if not std > 0:
        raise ValueError(f"divergence: std is {std}, it must be positive")
    return reduce_latent((mean_p - mean_q) ** 2 / (2 * std**2), reduce)


def score_inner(mean: Tensor, eps: Tensor, std: float) -> Tensor:
    """sum_d mean * sg[eps / std], (N, D...) to (N,).

    Its gradient equals that of the summed log density at the sampled point: d log p / d mean = (x - mean) / std^2
    = eps / std. This is the likelihood-ratio surrogate with borrowed noise (RLR, arXiv 2502.00639).
    """
    same(mean=mean, eps=eps)
    if not std > 0:
        raise ValueError(f"score_inner: std is {std}, noise can only be borrowed where it was injected")
    cotangent = (eps / std).detach()
    return reduce_latent(mean * cotangent, "sum")
