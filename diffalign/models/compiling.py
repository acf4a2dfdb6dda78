"""Compiled blocks: kernels that a network's repeated parts are fused into, at the price of other last bits."""

from __future__ import annotations

from typing import Any

import torch

from diffalign.models import lora
from diffalign.runtime.sharding import blocks

RECOMPILATIONS = 64  # one code object serves all blocks: with and without gradient, with and without one of the input, each text length


def compile_blocks(pipe: Any) -> None:
    """Let the denoisers' blocks be compiled at their first calls, which takes a minute or two."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILATIONS)
    for module in lora.denoisers(pipe).values():
        for block in blocks(module):
            block.compile()
