"""A judge's network whose linear layers are held in 8 or 4 bits, by torchao and bitsandbytes. It has no gradient to the pixels."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn


def quantised(net: Any, how: str, whole: Collection[str] = ()) -> Any:
    """The network itself with its linear layers quantised, on the card where there is one, one after another.

    int8: weights with a scale for each row; nf4: blocks of 64 with a scale each; products are in the type of the weights before, on a card
    bfloat16. whole: names of layers that stay as they are; none: all do.
    """
    if how == "none":
        return net
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        net.to(torch.bfloat16)

    def chosen(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and name not in whole

    if how == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(net, Int8WeightOnlyConfig(), filter_fn=chosen, device=device)
    else:
        for name, module in [(name, module) for name, module in net.named_modules() if chosen(module, name)]:
            net.set_submodule(name, _four_bits(module).to(device))
    return net.requires_grad_(False).eval()


def _four_bits(layer: Any) -> nn.Module:
    """Not quantised before it is moved to a device."""
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    kind: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": True}
    with torch.device("meta"):
        made = Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=layer.weight.dtype, **kind
        )
    made.weight, made.bias = Params4bit(layer.weight.data, requires_grad=False, **kind), layer.bias
    return made
