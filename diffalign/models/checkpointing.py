"""Keeping only the inputs of a network's blocks for the gradient: each runs again when its gradient is taken."""

from __future__ import annotations

from typing import Any

from torch.utils.checkpoint import checkpoint


def _again(module: Any, *args: Any, **kwargs: Any) -> Any:
    # Nothing here draws: the state of generators need not be kept.
    return checkpoint(module.__call__, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def by_blocks(module: Any) -> bool:
    """Let a network of diffusers run block by block; False, and nothing changed, where its class cannot."""
    if not getattr(module, "_supports_gradient_checkpointing", False):
        return False
    module.enable_gradient_checkpointing(_again)  # type: ignore[operator]
    # A class may say that it can and have no block that does: a tiny autoencoder.
    return any(
        part is not module and getattr(part, "gradient_checkpointing", False) for part in module.modules()
    ) or bool(getattr(module, "gradient_checkpointing", False))
