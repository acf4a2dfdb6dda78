"""Features kept from step to step while a trajectory is drawn: blocks that would change little are not run. Other samples, sooner.

The caches are diffusers' own, for networks that are its `CacheMixin`. One is switched on for a trajectory and off after it, so that each
begins empty and nothing else ever sees it; calls with and without the prompt are kept apart by the pipeline (`cache_context`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from diffalign.errors import UserError, one_line
from diffalign.runtime.memory import out_of_memory
from diffalign.runtime.sharding import blocks

# Families that can, as docs/pipelines.md calls them; a test tries all. FLUX.2 cannot, though its network is a `CacheMixin`: its
# single-stream blocks hand on another form than its first block (diffusers 0.42.1).
ABLE = ("FLUX.1", "Qwen-Image", "CogView4", "Wan 2.1", "Wan 2.2", "HunyuanVideo", "LTX-Video")


@dataclass
class Cache:
    """A first-block cache (`FirstBlockCacheConfig` of diffusers).

    The first block is always run. Where its change to the features differs from that of the last full call by no more than `threshold`,
    mean absolute difference over mean absolute value of the micro-batch, the other blocks' changes are taken from that call.

    called, run: calls of blocks that were made while it was on, and those of them that were not spared.
    """

    threshold: float
    called: int = 0
    run: int = 0

    @contextmanager
    def on(self, networks: Iterable[nn.Module]) -> Iterator[None]:
        """Switched on, and empty, for the length of the context."""
        with ExitStack() as stack:
            for network in networks:
                stack.enter_context(self._on(network))
            yield

    @contextmanager
    def _on(self, network: Any) -> Iterator[None]:
        from diffusers import FirstBlockCacheConfig

        parts = {block: vars(block).get("forward") for block in blocks(network)}
        try:
            for block in parts:
                block.forward = self._counted(block.forward, "run")
            inner = {block: block.forward for block in parts}
            network.enable_cache(FirstBlockCacheConfig(self.threshold))
            for block, own in parts.items():
                if block.forward is inner[block]:  # one that is always run
                    _put(block, own)
                else:
                    block.forward = self._counted(block.forward, "called")
            yield
        finally:
            if network.is_cache_enabled:
                network.disable_cache()
            for block, own in parts.items():
                _put(block, own)

    def _counted(self, forward: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(forward)
        def counted(*args: Any, **kwargs: Any) -> Any:
            setattr(self, name, getattr(self, name) + 1)
            return forward(*args, **kwargs)

        return counted


def try_out(networks: dict[str, nn.Module], two_steps: Callable[[], None]) -> None:
    """Let a pipeline walk two steps, of which the second must spare blocks.

    Raises:
        UserError: if its networks keep no features, it cannot be run so, or spares nothing.
    """
    unable = [f"{name} ({type(x).__name__})" for name, x in networks.items() if not hasattr(x, "enable_cache")]
    why = f"this model's {unable[0]} keeps no features between steps" if unable else ""
    if why := why or _tried(Cache(math.inf), networks.values(), two_steps):
        raise UserError(f"sampler.cache: got first_block, {why}; allowed is null, or a model of {', '.join(ABLE)}")


def _tried(trial: Cache, networks: Iterable[nn.Module], two_steps: Callable[[], None]) -> str:
    """What is wrong with two steps."""
    try:
        with trial.on(networks):
            two_steps()
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError, AssertionError) as error:
        if out_of_memory(error):
            raise
        return f"this model's pipeline cannot be run so ({one_line(error)})"
    return "this model's pipeline runs every block all the same" if trial.called == trial.run else ""


def _put(block: nn.Module, forward: Any) -> None:
    """Give a block the forward of its own that it had, or that of its class."""
    if forward is None:
        vars(block).pop("forward", None)
    else:
        block.forward = forward
