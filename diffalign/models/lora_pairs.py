"""Which file is for which denoiser of a pipeline, and what a file's LoRA is for a denoiser: pairs of halves that fit its layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from diffalign.models import lora_normal
from diffalign.models.lora import denoisers
from diffalign.models.notes import LORA, files_of


@dataclass(frozen=True)
class Part:
    """A denoiser's file, and what the pipeline's loader must be told to put it there."""

    component: str
    file: str
    options: dict[str, bool] = field(default_factory=dict)


def parts(pipe: Any) -> list[Part]:
    """One for every denoiser; the first has diffusers' own name for a LoRA file."""
    first, *others = denoisers(pipe)
    stem = LORA.removesuffix(".safetensors")
    return [
        Part(first, LORA),
        *(Part(name, f"{stem}.{name}.safetensors", {f"load_into_{name}": True}) for name in others),
    ]


def pairs(pipe: Any, place: Path) -> dict[str, dict[str, lora_normal.Pair]]:
    """A LoRA by component and layer: of a folder in diffusers' layout, one file for each denoiser, or of a file of another tool.

    Raises:
        ValueError: if it has anything that the pipeline has no place for.
    """
    if not place.is_dir():
        ((component, module), *others) = denoisers(pipe).items()
        if others:
            raise ValueError(
                f"it is one file, this model has {component} and {others[0][0]}; allowed is a folder of ours"
            )
        return {component: fitting(module, place)}
    if extra := [path.name for path in files_of(place) if path.name not in [part.file for part in parts(pipe)]]:
        raise ValueError(f"it has {extra[0]}, for which the model has no place")
    if lacking := [part.file for part in parts(pipe) if not (place / part.file).is_file()]:
        raise ValueError(f"there is no {lacking[0]} in it")
    return {part.component: fitting(getattr(pipe, part.component), place / part.file) for part in parts(pipe)}


def fitting(module: Any, path: Path) -> dict[str, lora_normal.Pair]:
    """A file's LoRA for a denoiser, of its layers' shapes."""
    found, modules = lora_normal.read(path, _outputs(module)), dict(module.named_modules())
    for layer, pair in found.items():
        own: Any = modules[layer]
        own = getattr(own, "base_layer", own)
        inputs = own.weight.shape[1:]
        if type(own) is torch.nn.Linear and tuple(pair.down.shape[1:]) != tuple(inputs):
            raise ValueError(f"layer {layer} takes {tuple(pair.down.shape[1:])} in it, in this model {tuple(inputs)}")
    return found


def _outputs(module: Any) -> dict[str, int]:
    """How many numbers each layer of a denoiser puts out."""
    weights = {part: getattr(layer, "weight", None) for part, layer in module.named_modules()}
    return {
        part: len(weight)
        for part, weight in weights.items()
        if isinstance(weight, torch.Tensor) and weight.ndim > 1 and ".base_layer" not in part and ".lora_" not in part
    }
