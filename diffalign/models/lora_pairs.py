"""Which file is for which denoiser of a pipeline, and what a file's LoRA is for a denoiser: pairs of halves that fit its layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from diffalign.models import lora_normal
from diffalign.models.lora import denoisers
from diffalign.models.lora_kinds import Change
from diffalign.models.notes import LORA, files_of

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


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
    return {component: fitting(getattr(pipe, component), path) for component, path in _files(pipe, place).items()}


def _files(pipe: Any, place: Path) -> dict[str, Path]:
    """The file for each denoiser."""
    if not place.is_dir():
        component, *others = denoisers(pipe)
        if others:
            raise ValueError(f"it is one file, this model has {component} and {others[0]}; allowed is a folder of ours")
        return {component: place}
    if extra := [path.name for path in files_of(place) if path.name not in [part.file for part in parts(pipe)]]:
        raise ValueError(f"it has {extra[0]}, for which the model has no place")
    if lacking := [part.file for part in parts(pipe) if not (place / part.file).is_file()]:
        raise ValueError(f"there is no {lacking[0]} in it")
    return {part.component: place / part.file for part in parts(pipe)}


def changes(pipe: Any, place: Path) -> dict[str, dict[str, Change]]:
    """What a folder in diffusers' layout, or a file of another tool, does to the weights of denoisers and text encoders, by component and
    layer; held against their shapes.

    Raises:
        ValueError: if it has anything that the pipeline has no place for.
    """
    found: dict[str, dict[str, Change]] = {}
    texts = [name for name in ENCODERS if isinstance(getattr(pipe, name, None), torch.nn.Module)]
    for number, (component, path) in enumerate(_files(pipe, place).items()):
        here = [component, *(texts if number == 0 else ())]  # a second expert's file has a denoiser alone
        found |= lora_normal.changes(path, {name: _outputs(getattr(pipe, name)) for name in here})
    for component, own in found.items():
        for layer, change in own.items():
            try:
                change.check(_weight(getattr(pipe, component).get_submodule(layer)).shape)
            except ValueError as error:
                raise ValueError(f"layer {layer} of the {component}: {error}") from error
    return found


def _weight(layer: Any) -> Any:
    return getattr(layer, "base_layer", layer).weight


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
