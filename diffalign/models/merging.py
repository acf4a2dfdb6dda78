"""Adapters that become part of the weights: W + strength (W' - W) for each, added up in float32 and rounded once to what W is held in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.models import lora_pairs
from diffalign.models.lora_kinds import Change
from diffalign.models.places import Adapter

Changes = dict[tuple[str, str], list[tuple[float, Change]]]


@torch.no_grad()
def merge(pipe: Any, adapters: Sequence[Adapter]) -> Counter[str]:
    """Add adapters to the weights of a pipeline that has none on it. Returns how many layers of each component were changed.

    Raises:
        ValueError: if one does not fit, says of which; or the weights are quantised.
    """
    found = _collected(pipe, adapters)
    for (component, layer), changes in found.items():
        weight = _weight(pipe, component, layer)
        weight.copy_(_changed(weight.float(), changes).to(weight.dtype))
    return Counter(component for component, _ in found)


def _collected(pipe: Any, adapters: Sequence[Adapter]) -> Changes:
    """What adapters do to each layer of a pipeline's components, with their strengths."""
    found: Changes = {}
    for adapter in adapters:
        try:
            own = lora_pairs.changes(pipe, adapter.folder)
        except ValueError as error:
            raise ValueError(f"{adapter} does not fit: {error}") from error
        for component, of_layers in own.items():
            for layer, change in of_layers.items():
                found.setdefault((component, layer), []).append((adapter.strength, change))
    for component, layer in found:
        if not (weight := _weight(pipe, component, layer)).is_floating_point():
            raise ValueError(f"layer {layer} of the {component} holds {weight.dtype}, which nothing is added to")
    return found


def _weight(pipe: Any, component: str, layer: str) -> Tensor:
    weight: Tensor = getattr(pipe, component).get_submodule(layer).weight
    return weight


def _changed(weight: Tensor, changes: list[tuple[float, Change]]) -> Tensor:
    total: Tensor = sum(strength * change.on(weight) for strength, change in changes)  # type: ignore[assignment]
    return weight + total


# -- the single file that a pipeline's weights came from


@torch.no_grad()
def merge_file(pipe: Any, adapters: Sequence[Adapter], source: Path, out: Path) -> Counter[str]:
    """Write a single file that a pipeline was loaded from, under its own names, with adapters added up in float32 to what it holds.

    A layer is found in it by its numbers, whatever its authors call it; it may be some rows of a larger one. Returns how many layers of
    each component were changed.

    Raises:
        ValueError: if an adapter does not fit, or a layer is not in the file exactly once.
    """
    from safetensors.torch import load_file, save_file

    from diffalign.models.notes import metadata

    found, tensors = _collected(pipe, adapters), load_file(source)
    places = {place: _rows(_weight(pipe, *place), tensors, place) for place in found}
    for place, changes in found.items():
        key, rows = places[place]
        exact = tensors[key][rows].float().view_as(_weight(pipe, *place))
        tensors[key][rows] = _changed(exact, changes).to(tensors[key].dtype).view_as(tensors[key][rows])
    save_file(tensors, out, metadata=metadata(source))
    return Counter(component for component, _ in found)


def _rows(weight: Tensor, tensors: dict[str, Tensor], place: tuple[str, str]) -> tuple[str, slice]:
    """The tensor of a file, and which of its rows, that a weight was loaded from."""
    own, found = weight.flatten(1), []
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.ndim < 2 or tensor.shape[1:].numel() != own.shape[1]:
            continue
        if len(tensor) < len(own):
            continue
        there = tensor.flatten(1)
        first = (there[: len(there) - len(own) + 1, 0].to(own.dtype) == own[0, 0]).nonzero().flatten().tolist()
        found += [
            (key, slice(row, row + len(own)))
            for row in first
            if torch.equal(there[row : row + len(own)].to(own.dtype), own)
        ]
    if len(found) != 1:
        many = f"{len(found)} times" if found else "not as it was loaded"
        raise ValueError(f"layer {place[1]} of the {place[0]} is in the file {many}; allowed is a folder")
    return found[0]
