"""What a layer's parts in a LoRA file do to its weight W (out, in...): LoRA, LoCon, LoHa, LoKr, a whole difference, as a DoRA too.

    LoRA, LoCon    s B A, a convolution's kernel in A (r, in, k, k); in CP form s sum_nm B[:, n] mid[n, m] A[m]
    LoHa           s (w1_a w1_b) * (w2_a w2_b), elementwise; in CP form each is sum_nm a[n] t[n, m] b[m]
    LoKr           s (w1 (x) w2), Kronecker, each whole or a product like those of LoHa
    DoRA           W' = m V / |V|, V = W + difference, |V| by rows, or by columns where m is (1, in)

s = alpha / r; LoKr with both factors whole: s = 1. Facts: LyCORIS as ComfyUI's readers have it, peft 0.21.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_KRON = (*(f"lokr_w{k}{end}" for k in (1, 2) for end in ("", "_a", "_b")), "lokr_t2")
# A kind's name in messages -> the parts that it has, and those that it may have.
KINDS = {
    "a LoRA": (("down", "up"), ()),
    "a LoCon in CP form": (("down", "up", "mid"), ()),
    "a LoHa, a product of low-rank matrices": (_HADA, ("hada_t1", "hada_t2")),
    "a LoKr, a Kronecker product": ((), _KRON),
    "a whole difference": (("diff",), ()),
}
LORA, CP, LOHA, LOKR, WHOLE = KINDS
DORA = "a DoRA, whose magnitudes a LoRA has no place for"
MAGNITUDES = ("magnitude", "dora_scale")  # peft's, one a row; LyCORIS', one a row or a column


@dataclass(frozen=True)
class Change:
    """What a file does to one layer's weight. parts: its tensors by name; scale: s above; rows: which of its outputs are this layer's,
    where layers are one in the file; None: all."""

    kind: str
    parts: Mapping[str, Tensor]
    scale: float
    rows: slice | None = None

    @property
    def dora(self) -> bool:
        """Whether it sets the weight's magnitudes."""
        return any(name in self.parts for name in MAGNITUDES)

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs times the kernel's size), without computing it.

        Raises:
            ValueError: if parts do not fit each other.
        """
        plain = replace(self, parts={name: tensor.to("meta") for name, tensor in self.parts.items()})
        try:
            found = plain.difference()
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"its parts are {self._shapes()}, which do not fit") from error
        return found.shape[0], found.shape[1]

    def _shapes(self) -> str:
        return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in self.parts.items())

    def difference(self) -> Tensor:
        """(outputs, inputs times the kernel's size), float32, with its scale, before magnitudes."""
        p = {name: tensor.float() for name, tensor in self.parts.items()}
        if self.kind == LORA:
            found = p["up"].flatten(1) @ p["down"].flatten(1)
        elif self.kind == CP:
            found = _through(p["mid"], p["up"].flatten(1).t(), p["down"].flatten(1))
        elif self.kind == LOHA:
            found = _factor(p, "hada_w1", "hada_t1") * _factor(p, "hada_w2", "hada_t2")
        elif self.kind == LOKR:
            one, two = _factor(p, "lokr_w1", ""), _factor(p, "lokr_w2", "lokr_t2")
            found = torch.kron(one.reshape(*one.shape, *[1] * (two.ndim - one.ndim)), two)
        else:
            found = p["diff"]
        return (self.scale * found.flatten(1))[self.rows or slice(None)]

    def on(self, weight: Tensor) -> Tensor:
        """What it adds to a weight (out, in...) of float32, of the weight's shape."""
        found = self.difference().to(weight.device).view_as(weight)
        if not self.dora:
            return found
        changed = weight + found
        name = next(name for name in MAGNITUDES if name in self.parts)
        magnitude = self.parts[name].float().to(weight.device)
        by_rows = name == "magnitude" or magnitude.ndim == 1 or magnitude.shape[0] > 1 or len(weight) == 1
        if by_rows:
            magnitude = magnitude.flatten()[self.rows or slice(None)]
        axis = 0 if by_rows else 1
        others = [k for k in range(weight.ndim) if k != axis]
        norm = torch.linalg.vector_norm(changed, dim=others, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return changed * (magnitude.reshape(norm.shape) / norm) - weight

    def check(self, shape: tuple[int, ...]) -> None:
        """Hold it against the shape of a layer's weight.

        Raises:
            ValueError: if it is for another.
        """
        flat = (shape[0], torch.Size(shape[1:]).numel())
        if self.shape != flat:
            raise ValueError(f"it changes a weight of {self.shape} there, in this model it is {flat}")
        for name in MAGNITUDES:
            if name not in self.parts:
                continue
            of = tuple(self.parts[name].shape)
            outputs = flat[0] if self.rows is None else replace(self, rows=None).shape[0]
            columns = name == "dora_scale" and len(of) > 1 and of[:2] == (1, shape[1]) and self.rows is None
            if not (columns or self.parts[name].numel() == outputs):
                raise ValueError(f"its magnitudes are {of}, which is neither one a row nor one a column of {flat}")


def _factor(parts: Mapping[str, Tensor], name: str, core: str) -> Tensor:
    """A whole matrix, a product of two, or one through a core."""
    if name in parts:
        return parts[name]
    a, b = parts[f"{name}_a"], parts[f"{name}_b"]
    return _through(parts[core], a, b) if core in parts else a @ b


def _through(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """sum_nm a[n, i] core[n, m, ...] b[m, j]: (i, j, ...)."""
    return torch.einsum("nm...,ni,mj->ij...", core, a, b).contiguous()


def kind_of(parts: Mapping[str, Tensor]) -> str:
    """Which kind parts are of.

    Raises:
        ValueError: if they are of none, or one is missing.
    """
    own = {name for name in parts if name not in MAGNITUDES}
    if own in ({"down"}, {"up"}):
        raise ValueError("it has one half of a LoRA only")
    kinds = [kind for kind, (needed, free) in KINDS.items() if own and set(needed) <= own <= {*needed, *free}]
    if not kinds:
        raise ValueError(f"its parts are {', '.join(sorted(parts)) or 'alpha'}, which is no kind that is known here")
    if kinds[0] == LOKR:
        for k in (1, 2):
            given = {name.removeprefix(f"lokr_w{k}") for name in own if name.startswith(f"lokr_w{k}")}
            if given not in ({""}, {"_a", "_b"}):
                raise ValueError(f"its parts are {', '.join(sorted(parts))}, of lokr_w{k} one is missing or too many")
        if "lokr_t2" in own and "lokr_w2" in own:
            raise ValueError("it has lokr_t2 beside a whole lokr_w2")
    return kinds[0]


def rank_of(kind: str, parts: Mapping[str, Tensor]) -> int:
    """What alpha is divided by; 0: nothing is."""
    if kind == LOKR:
        found = [parts[name] for name in ("lokr_w2_b", "lokr_w1_b") if name in parts]
        return len(found[0]) if found else 0
    if kind == WHOLE:
        return 0
    return len(parts["down" if "down" in parts else "hada_w1_b"])
