"""LoRA files of other tools in one normal form: two halves and a scale for each layer, by diffusers' names.

effect of a layer: W + scale B A, A (r, in) and B (out, r). Formats differ in names and in where the strength is; every tensor of a file is
used or named in the refusal. Facts on the names: the readers of diffusers 0.42.1 and ComfyUI 0.19.3.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from diffalign.errors import one_line, shown
from diffalign.models import halves
from diffalign.models.layer_names import WAN, fused
from diffalign.models.notes import PEFT_CONFIG, PEFT_FILE, lora_settings, metadata

# Endings of names -> which part of a layer they are. The longest that fits counts.
_PARTS = {
    **dict.fromkeys((".lora_A.weight", ".lora_A.default.weight", ".lora_down.weight", ".lora.down.weight"), "down"),
    **dict.fromkeys(("_lora.down.weight", ".lora_linear_layer.down.weight"), "down"),
    **dict.fromkeys((".lora_B.weight", ".lora_B.default.weight", ".lora_up.weight", ".lora.up.weight"), "up"),
    **dict.fromkeys(("_lora.up.weight", ".lora_linear_layer.up.weight"), "up"),
    ".alpha": "alpha",
}
DORA = "a DoRA, whose magnitudes a LoRA has no place for"
# What is no LoRA, or more than one: said by its name.
_OTHERS = (
    (re.compile(r"\.(dora_scale|lora_magnitude_vector.*)$"), DORA),
    (re.compile(r"\.hada_[wt]\d"), "a LoHa, a product of low-rank matrices"),
    (re.compile(r"\.lokr_[wt]\d"), "a LoKr, a Kronecker product"),
    (re.compile(r"\.lora_mid\.weight$"), "a LoCon in CP form"),
    (re.compile(r"\.(lora_B(\.default)?\.bias|diff_b|diff)$"), "biases or whole differences besides its LoRA"),
)
_DOTTED = ("base_model.model.", "diffusion_model.", "")
_FLAT = ("lora_unet_", "lora_transformer_", "lycoris_")


@dataclass(frozen=True)
class Pair:
    """A layer's halves and how strongly their product acts."""

    down: Tensor
    up: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """Rows of A."""
        return len(self.down)


@dataclass
class _Layer:
    parts: dict[str, Tensor] = field(default_factory=dict)
    key: str = ""


def read(path: Path, sizes: Mapping[str, int]) -> dict[str, Pair]:
    """A file's LoRA for a denoiser that has these layers, by their names; sizes: how many numbers each puts out.

    Raises:
        ValueError: if the file is damaged, no LoRA, or has a tensor that this denoiser has no place for, which it names.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path.name} is damaged: {one_line(error)}") from error
    strengths, named = _strengths(path), _Names(sizes)
    for key, what in (
        ("use_dora", DORA),
        ("lora_bias", "a LoRA with biases"),
    ):
        if strengths.get(key):
            raise ValueError(f"it is {what}: its settings say {key}")
    found: dict[tuple[str, ...], _Layer] = {}
    for key, tensor in tensors.items():
        stem, part = _split(key)
        if halves.ENCODERS.match(stem):
            raise ValueError(f"it has layers of a text encoder ({shown(key)}), which is not trained here")
        several = named.layers(stem)
        if not several:
            raise ValueError(
                f"{shown(key)} is of no layer of this denoiser: it is of another model, or named in another way"
            )
        made = found.setdefault(several, _Layer(key=stem))
        if part in made.parts:
            raise ValueError(f"layer {stem} is in it twice")
        made.parts[part] = tensor
    if not found:
        raise ValueError("it holds no layer of a LoRA")
    pairs: dict[str, Pair] = {}
    for several, made in found.items():
        for layer, pair in zip(several, _apart(_pair(made, strengths), [sizes[k] for k in several], made), strict=True):
            if layer in pairs:
                raise ValueError(f"layer {layer} is in it twice")
            pairs[layer] = pair
    return pairs


def dotted(pairs: Mapping[str, Pair], prefix: str) -> dict[str, Tensor]:
    """Pairs as diffusers and peft name halves, in float32, their strengths in B."""
    found: dict[str, Tensor] = {}
    for layer, pair in pairs.items():
        found[f"{prefix}{layer}.lora_A.weight"] = pair.down.float()
        found[f"{prefix}{layer}.lora_B.weight"] = pair.up.float() * pair.scale
    return found


def _apart(whole: Pair, sizes: list[int], made: _Layer) -> list[Pair]:
    """The pairs of layers that are one in a file: A is shared, of B each has its rows."""
    if len(whole.up) != sum(sizes):
        raise ValueError(
            f"layer {made.key} puts out {len(whole.up)} numbers, this model's {' + '.join(map(str, sizes))}"
        )
    return [Pair(whole.down, rows, whole.scale) for rows in whole.up.split(sizes)]


def _split(key: str) -> tuple[str, str]:
    """A tensor's layer, as the file names it, and which part of it it is."""
    for pattern, what in _OTHERS:
        if pattern.search(key):
            raise ValueError(f"it is {what} ({shown(key)}); allowed is a LoRA")
    endings = [ending for ending in _PARTS if key.endswith(ending)]
    if not endings:
        raise ValueError(f"{shown(key)} is no part of a LoRA")
    ending = max(endings, key=len)
    stem = key.removesuffix(ending)
    # Old attention processors: attn1.processor.to_q_lora stands for attn1.to_q, to_out for the first of its two.
    stem = re.sub(r"\.processor\.(to_\w+)$", r".\1", stem)
    return re.sub(r"\.to_out$", ".to_out.0", stem) if ending.startswith("_lora") else stem, _PARTS[ending]


class _Names:
    """A denoiser's layers by every name that tools have for them; a name may stand for several, whose outputs it has one after another."""

    def __init__(self, layers: Collection[str]) -> None:
        self._found: dict[str, tuple[str, ...] | None] = {}
        for layer in layers:
            self._add(layer, (layer,))
            theirs = layer
            for ours, name in WAN:
                theirs = theirs.replace(ours, name)
            self._add(theirs, (layer,))
        for name, several in fused(layers).items():
            self._add(name, several)

    def _add(self, name: str, several: tuple[str, ...]) -> None:
        dotted = {f"{prefix}{name}" for prefix in (*_DOTTED, "transformer.", "unet.")}
        flat = {f"{prefix}{name.replace('.', '_')}" for prefix in _FLAT}
        for full in dotted | flat:
            # Two layers of one name in a file that has underscores for dots: neither can be told.
            self._found[full] = several if self._found.get(full, several) == several else None

    def layers(self, name: str) -> tuple[str, ...]:
        """diffusers' names of the layers that a name stands for; none if there are none or they cannot be told."""
        return self._found.get(name) or ()


def _pair(made: _Layer, strengths: Mapping[str, Any]) -> Pair:
    layer = made.key
    down, up = halves.pair(layer, made.parts.get("down"), made.parts.get("up"))
    if strange := [t.dtype for t in (down, up) if str(t.dtype).removeprefix("torch.") not in halves.FLOATS]:
        raise ValueError(f"layer {layer} holds {strange[0]}, allowed are {', '.join(halves.FLOATS)}")
    if not (down.isfinite().all() and up.isfinite().all()):
        raise ValueError(f"layer {layer} holds numbers that are not finite")
    rank = len(down)
    if rank == 0:
        raise ValueError(f"layer {layer} has a rank of 0")
    alpha = made.parts.get("alpha")
    if alpha is not None and alpha.numel() != 1:
        raise ValueError(f"layer {layer} has an alpha of {tuple(alpha.shape)}, expected one number")
    scale = _scale(made.key, rank, strengths) if alpha is None else float(alpha) / rank
    if not 0 < abs(scale) < 1e6:
        raise ValueError(f"layer {layer} has a strength of {scale:g}")
    return Pair(down, up, scale)


def _strengths(path: Path) -> dict[str, Any]:
    """What a file's metadata, or peft's config beside it, say of strengths; empty: 1."""
    beside = path.parent / PEFT_CONFIG
    if path.name == PEFT_FILE:
        try:
            found = json.loads(beside.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{beside.name} beside it cannot be read: {one_line(error)}") from error
        if not isinstance(found, dict):
            raise ValueError(f"{beside.name} beside it holds no object")
        return found
    notes = metadata(path)
    if "lora_adapter_metadata" not in notes:
        return {}
    return {key.partition(".")[2]: value for key, value in lora_settings(notes).items()}


def _scale(name: str, rank: int, strengths: Mapping[str, Any]) -> float:
    """alpha / r, or alpha / sqrt(r), as peft's settings have it for a layer; 1 where they say nothing."""
    if "lora_alpha" not in strengths:
        return 1.0
    alpha = strengths["lora_alpha"]
    for pattern, other in _items(strengths.get("alpha_pattern")):
        if re.search(rf"(^|\.){re.escape(pattern)}$", name):
            alpha = other
    if type(alpha) not in (int, float):
        raise ValueError(f"its lora_alpha is {shown(alpha)}, expected a number")
    return alpha / (rank**0.5 if strengths.get("use_rslora") else rank)


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    if value and not isinstance(value, dict):
        raise ValueError(f"its alpha_pattern is {shown(value)}, expected an object")
    yield from (value or {}).items()
