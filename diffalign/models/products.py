"""LoRA's products, lean: y = W x + b + s B A x in the network's precision, with one addition and nothing kept twice.

peft's own layers multiply in the adapter's precision, float32: under a bfloat16 base that is a float32 copy of every input, kept for
the gradient, and products of several times the cost. Here A and B are rounded to the input's precision for the product alone; they and
their gradients stay float32.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

TRAINED = "default"  # peft's name for the adapter that is trained
FROZEN = "frozen_"  # with what names of those begin that stand by beside it: plain LoRA too


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """W x + bias + scale B A x, x as rows, and A x."""
    out, rows = F.linear(x, weight, bias), x.reshape(-1, x.shape[-1])
    inner = rows.mm(a.t())
    out.view(-1, out.shape[-1]).addmm_(inner, b.t(), alpha=scale)
    return out, rows, inner


class _Product(torch.autograd.Function):
    """The product with gradient to x, A and B. torch's own would keep the sum of two gradients of x beside them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        out, rows, inner = _product(x, weight, bias, a, b, scale)
        ctx.save_for_backward(rows, inner, weight, a, b)
        ctx.scale, ctx.shape = scale, x.shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, weight, a, b = ctx.saved_tensors
        g = gradient.reshape(-1, gradient.shape[-1])
        g_inner = g.mm(b).mul_(ctx.scale)  # dL/d(A x) = s B^T g
        to_a, to_b = g_inner.t().mm(rows), g.t().mm(inner).mul_(ctx.scale)
        to_x = g.mm(weight).addmm_(g_inner, a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return to_x, None, None, to_a, to_b, None


class _Lean:
    """A peft layer around a linear one whose trained adapter, or one that stands by, alone and as it is, goes the short way."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = self._active_adapter[0] if len(self._active_adapter) == 1 else ""
        short = name == TRAINED or name.startswith(FROZEN)
        if not short or self.merged_adapters or args or kwargs:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if self._disable_adapters or name not in self.scaling:  # an adapter may have other layers
            return self.base_layer(x)
        base = self._modules["base_layer"]
        a, b = (self._modules[half]._modules[name].weight.to(x.dtype) for half in ("lora_A", "lora_B"))
        weight, scale = base.weight, self.scaling[name]
        if type(weight) is nn.Parameter:
            if torch.is_grad_enabled():
                return _Product.apply(x, weight, base.bias, a, b, scale)
            return _product(x, weight, base.bias, a, b, scale)[0]
        out = base(x)  # of a quantised weight, which multiplies in its own way
        rows = x.reshape(-1, x.shape[-1])
        return torch.addmm(out.reshape(-1, out.shape[-1]), rows.mm(a.t()), b.t(), alpha=scale).view(out.shape)


@functools.cache
def _lean(kind: type) -> type:
    return type("Lean" + kind.__name__, (_Lean, kind), {})


def make_lean(module: nn.Module) -> None:
    """Let a denoiser's linear layers with LoRA multiply the short way."""
    for layer in [part for part in module.modules() if isinstance(part, BaseTunerLayer)]:
        if isinstance(layer.base_layer, nn.Linear) and not isinstance(layer, _Lean):
            kind: Any = type(layer)
            layer.__class__ = _lean(kind)
