"""LoRA files of other tools in one normal form: what a file does to each layer, by diffusers' names.

Formats differ in names and in where the strength is; every tensor of a file is used or named in the refusal. A LoRA is two halves and a
scale: W + scale B A, A (r, in) and B (out, r); what else there is, `lora_kinds` has. Facts on the names: the readers of diffusers 0.42.1
and ComfyUI 0.19.3.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from diffalign.errors import one_line, shown
from diffalign.models import halves, lora_kinds
from diffalign.models.layer_names import Spelled
from diffalign.models.lora_kinds import DORA, Change
from diffalign.models.notes import PEFT_CONFIG, PEFT_FILE, lora_settings, metadata

# Endings of names -> which part of a layer they are. The longest that fits counts.
_PARTS = {
    **dict.fromkeys((".lora_A.weight", ".lora_A.default.weight", ".lora_down.weight", ".lora.down.weight"), "down"),
    **dict.fromkeys(("_lora.down.weight", ".lora_linear_layer.down.weight"), "down"),
    **dict.fromkeys((".lora_B.weight", ".lora_B.default.weight", ".lora_up.weight", ".lora.up.weight"), "up"),
    **dict.fromkeys(("_lora.up.weight", ".lora_linear_layer.up.weight"), "up"),
    **{f".lora_magnitude_vector{end}": "magnitude" for end in ("", ".weight", ".default", ".default.weight")},
    **{f".{name}": name for _, several in lora_kinds.KINDS.values() for name in several},
    **{f".{name}": name for name in lora_kinds.KINDS[lora_kinds.LOHA][0]},
    **{".lora_mid.weight": "mid", ".diff": "diff", ".dora_scale": "dora_scale", ".alpha": "alpha"},
}
# What nothing here has a place for: said by its name.
_OTHERS = ((re.compile(r"\.(lora_B(\.default)?\.bias|diff_b)$"), "biases besides its LoRA"),)
_DENOISER = "denoiser"
# XLabs' FLUX: 1 is the picture's stream, 2 the text's.
_XLABS = re.compile(r"(double_blocks\.\d+)\.processor\.(qkv|proj)_lora([12])\.(down|up)\.weight")
MERGED = "lora.frozen and `merge` take it"


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
    keys: list[str] = field(default_factory=list)


Sizes = Mapping[str, Mapping[str, int]]


def read(path: Path, sizes: Mapping[str, int]) -> dict[str, Pair]:
    """A file's LoRA for a denoiser that has these layers, by their names; sizes: how many numbers each puts out.

    Raises:
        ValueError: if the file is damaged, no LoRA, or has a tensor that this denoiser, or a LoRA, has no place for, which it names.
    """
    found: dict[str, Pair] = {}
    for layer, (change, made) in _changes(path, {_DENOISER: sizes}, merged=False)[_DENOISER].items():
        if change.kind != lora_kinds.LORA or change.dora:
            what = DORA if change.dora else change.kind
            key = next(key for key in made.keys if _split(key)[1] not in ("down", "up", "alpha"))
            raise ValueError(f"it is {what} ({shown(key)}); allowed is a LoRA, {MERGED}")
        rows = change.rows or slice(None)
        found[layer] = Pair(change.parts["down"], change.parts["up"][rows], change.scale)
    return found


def changes(path: Path, sizes: Sizes) -> dict[str, dict[str, Change]]:
    """What a file does to each layer of a pipeline's denoiser and text encoders, by component; sizes: as for `read`.

    Raises:
        ValueError: if the file is damaged, or has a tensor that these have no place for, which it names.
    """
    found = _changes(path, sizes, merged=True)
    return {component: {layer: change for layer, (change, _) in own.items()} for component, own in found.items() if own}


def _changes(path: Path, sizes: Sizes, merged: bool) -> dict[str, dict[str, tuple[Change, _Layer]]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path.name} is damaged: {one_line(error)}") from error
    strengths = _strengths(path)
    if strengths.get("lora_bias"):
        raise ValueError("it is a LoRA with biases: its settings say lora_bias")
    if strengths.get("use_dora") and not merged:
        raise ValueError(f"it is {DORA}: its settings say use_dora; {MERGED}")
    found: dict[str, dict[str, tuple[Change, _Layer]]] = {component: {} for component in sizes}
    for (component, several), made in _layers(tensors, Spelled(sizes), merged).items():
        change = _change(made, strengths)
        if strengths.get("use_dora") and not change.dora:
            raise ValueError(f"layer {made.key} has no magnitudes, though its settings say use_dora")
        outputs = [sizes[component][layer] for layer in several]
        for layer, rows in zip(several, _rows(change, outputs, made), strict=True):
            if layer in found[component]:
                raise ValueError(f"layer {layer} is in it twice")
            found[component][layer] = replace(change, rows=rows), made
    return found


def _layers(tensors: Mapping[str, Tensor], spelled: Spelled, merged: bool) -> dict[tuple[str, tuple[str, ...]], _Layer]:
    """A file's tensors by the component and layers that they are for."""
    found: dict[tuple[str, tuple[str, ...]], _Layer] = {}
    for key, tensor in tensors.items():
        stem, part = _split(key)
        place = spelled.layers(stem)
        if place is None and halves.ENCODERS.match(stem) and not merged:
            raise ValueError(f"it has layers of a text encoder ({shown(key)}), which is not trained here; {MERGED}")
        if place is None and halves.ENCODERS.match(stem) and not spelled.encoders:
            raise ValueError(
                f"it has layers of a text encoder ({shown(key)}), and none is loaded; where prompts.cache lets them go, allowed is null"
            )
        if place is None:
            whose = "this model" if merged else "this denoiser"
            raise ValueError(f"{shown(key)} is of no layer of {whose}: it is of another model, or named in another way")
        made = found.setdefault(place, _Layer(key=stem))
        if part in made.parts:
            raise ValueError(f"layer {stem} is in it twice")
        made.parts[part] = tensor
        made.keys.append(key)
    if not found:
        raise ValueError("it holds no layer of a LoRA")
    return found


def dotted(pairs: Mapping[str, Pair], prefix: str) -> dict[str, Tensor]:
    """Pairs as diffusers and peft name halves, in float32, their strengths in B."""
    found: dict[str, Tensor] = {}
    for layer, pair in pairs.items():
        found[f"{prefix}{layer}.lora_A.weight"] = pair.down.float()
        found[f"{prefix}{layer}.lora_B.weight"] = pair.up.float() * pair.scale
    return found


def _rows(change: Change, sizes: list[int], made: _Layer) -> list[slice | None]:
    """Which outputs of a layer in a file are those of each of ours that it stands for."""
    if len(sizes) == 1 and change.kind != lora_kinds.LORA:
        return [None]  # held against the weight itself
    outputs = len(change.parts["up"]) if change.kind == lora_kinds.LORA else change.shape[0]
    if outputs != sum(sizes):
        raise ValueError(f"layer {made.key} puts out {outputs} numbers, this model's {' + '.join(map(str, sizes))}")
    ends = [sum(sizes[: k + 1]) for k in range(len(sizes))]
    return [slice(end - size, end) if len(sizes) > 1 else None for end, size in zip(ends, sizes, strict=True)]


def _split(key: str) -> tuple[str, str]:
    """A tensor's layer, as the file names it, and which part of it it is."""
    for pattern, what in _OTHERS:
        if pattern.search(key):
            raise ValueError(f"it has {what} ({shown(key)}), which are not taken")
    if xlabs := _XLABS.fullmatch(key):
        return f"{xlabs[1]}.{'img' if xlabs[3] == '1' else 'txt'}_attn.{xlabs[2]}", xlabs[4]
    endings = [ending for ending in _PARTS if key.endswith(ending)]
    if not endings:
        raise ValueError(f"{shown(key)} is no part of a LoRA")
    ending = max(endings, key=len)
    stem = key.removesuffix(ending)
    # Old attention processors: attn1.processor.to_q_lora stands for attn1.to_q, to_out for the first of its two.
    stem = re.sub(r"\.processor\.(to_\w+)$", r".\1", stem)
    return re.sub(r"\.to_out$", ".to_out.0", stem) if ending.startswith("_lora") else stem, _PARTS[ending]


def _change(made: _Layer, strengths: Mapping[str, Any]) -> Change:
    layer = made.key
    parts = {name: tensor for name, tensor in made.parts.items() if name != "alpha"}
    try:
        kind = lora_kinds.kind_of(parts)
    except ValueError as error:
        raise ValueError(f"layer {layer}: {error}") from error
    if kind == lora_kinds.LORA:
        halves.pair(layer, parts["down"], parts["up"])
    if strange := [t.dtype for t in parts.values() if str(t.dtype).removeprefix("torch.") not in halves.FLOATS]:
        raise ValueError(f"layer {layer} holds {strange[0]}, allowed are {', '.join(halves.FLOATS)}")
    if not all(tensor.isfinite().all() for tensor in parts.values()):
        raise ValueError(f"layer {layer} holds numbers that are not finite")
    if any(tensor.ndim == 0 or tensor.numel() == 0 for tensor in parts.values()):
        raise ValueError(f"layer {layer} has a rank of 0")
    alpha, rank = made.parts.get("alpha"), lora_kinds.rank_of(kind, parts)
    if alpha is not None and alpha.numel() != 1:
        raise ValueError(f"layer {layer} has an alpha of {tuple(alpha.shape)}, expected one number")
    # Without a rank, alpha says nothing.
    if kind == lora_kinds.LOKR and alpha is None:
        rank = rank or strengths.get("r", 0)  # peft's settings hold for whole factors too
    scale = _scale(layer, rank, strengths) if alpha is None else float(alpha) / rank if rank else 1.0
    if not 0 < abs(scale) < 1e6:
        raise ValueError(f"layer {layer} has a strength of {scale:g}")
    return Change(kind, parts, scale)


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
    alpha = strengths.get("lora_alpha", strengths.get("alpha"))
    if alpha is None or not rank:
        return 1.0
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
