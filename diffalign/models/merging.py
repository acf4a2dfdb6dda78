"""Adapters that become part of the weights: W + strength scale B A, added up in float32 and rounded once to what W is held in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.models import lora_pairs
from diffalign.models.places import Adapter


@torch.no_grad()
def merge(pipe: Any, adapters: Sequence[Adapter]) -> int:
    """Add adapters to the weights of a pipeline that has none on it. Returns how many layers were changed.

    Raises:
        ValueError: if one does not fit, says of which; or the weights are quantised.
    """
    sums: dict[tuple[str, str], Tensor] = {}
    for adapter in adapters:
        try:
            found = lora_pairs.pairs(pipe, adapter.folder)
        except ValueError as error:
            raise ValueError(f"{adapter} does not fit: {error}") from error
        for component, pairs in found.items():
            for layer, pair in pairs.items():
                up, down = pair.up.float().flatten(1), pair.down.float().flatten(1)
                difference = (adapter.strength * pair.scale) * (up @ down)
                place = component, layer
                sums[place] = sums[place] + difference if place in sums else difference
    for (component, layer), difference in sums.items():
        weight = getattr(pipe, component).get_submodule(layer).weight
        if not weight.is_floating_point() or weight.numel() != difference.numel():
            raise ValueError(
                f"layer {layer} of the {component} holds {tuple(weight.shape)} {weight.dtype}, which it does not fit"
            )
        weight.copy_((weight.float() + difference.to(weight.device).view_as(weight)).to(weight.dtype))
    return len(sums)
