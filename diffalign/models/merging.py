"""Adapters that become part of the weights: W + strength (W' - W) for each, added up in float32 and rounded once to what W is held in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from diffalign.models import lora_pairs
from diffalign.models.lora_kinds import Change
from diffalign.models.places import Adapter


@torch.no_grad()
def merge(pipe: Any, adapters: Sequence[Adapter]) -> Counter[str]:
    """Add adapters to the weights of a pipeline that has none on it. Returns how many layers of each component were changed.

    Raises:
        ValueError: if one does not fit, says of which; or the weights are quantised.
    """
    found: dict[tuple[str, str], list[tuple[float, Change]]] = {}
    for adapter in adapters:
        try:
            own = lora_pairs.changes(pipe, adapter.folder)
        except ValueError as error:
            raise ValueError(f"{adapter} does not fit: {error}") from error
        for component, of_layers in own.items():
            for layer, change in of_layers.items():
                found.setdefault((component, layer), []).append((adapter.strength, change))
    for component, layer in found:
        if not (weight := getattr(pipe, component).get_submodule(layer).weight).is_floating_point():
            raise ValueError(f"layer {layer} of the {component} holds {weight.dtype}, which nothing is added to")
    for (component, layer), changes in found.items():
        weight = getattr(pipe, component).get_submodule(layer).weight
        exact = weight.float()
        weight.copy_((exact + sum(strength * change.on(exact) for strength, change in changes)).to(weight.dtype))
    return Counter(component for component, _ in found)
