"""Shapes that must agree: tensors of (N, 1) and (N,) would broadcast to (N, N) without a word."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def same(**tensors: Tensor) -> None:
    """Hold tensors to one shape.

    Raises:
        ValueError: naming them with their shapes.
    """
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        given = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"shapes differ: {given}")
