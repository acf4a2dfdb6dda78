"""Adapters that become part of the weights: W + strength scale B A, added up in float32 and rounded once to what W is held in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from diffalign.models import lora_files
from diffalign.models.lora import denoisers, quiet
from diffalign.models.places import Adapter

NAME = "merged"


@torch.no_grad()
def merge(pipe: Any, adapters: Sequence[Adapter]) -> int:
    """Add adapters to a pipeline's weights, in this order; no layer of peft is left. Returns how many layers were changed.

    Raises:
        ValueError: if one does not fit, says of which; or the weights are quantised.
    """
    changed: set[tuple[str, str]] = set()
    sums: dict[tuple[str, str], torch.Tensor] = {}
    for adapter in adapters:
        try:
            load = lora_files.load if adapter.folder.is_dir() else lora_files.load_file
            load(pipe, adapter.folder, NAME)
            for place, layer in _layers(pipe):
                difference = layer.get_delta_weight(NAME).float() * adapter.strength
                sums[place] = sums[place] + difference if place in sums else difference
                changed.add(place)
        except ValueError as error:
            raise ValueError(f"{adapter.folder} does not fit: {error}") from error
        finally:
            with quiet():
                pipe.unload_lora_weights()
    for (component, name), difference in sums.items():
        weight = getattr(pipe, component).get_submodule(name).weight
        if not weight.is_floating_point() or weight.shape != difference.shape:
            raise ValueError(f"layer {name} of the {component} is quantised, what is added to it would be rounded away")
        weight.copy_((weight.float() + difference.to(weight.device)).to(weight.dtype))
    return len(changed)


def _layers(pipe: Any) -> Iterator[tuple[tuple[str, str], Any]]:
    """The layers that the adapter is on, by component and name.

    Raises:
        ValueError: for what no difference of weights is.
    """
    elsewhere = [
        component
        for component, names in pipe.get_list_adapters().items()
        if NAME in names and component not in denoisers(pipe)
    ]
    if elsewhere:
        raise ValueError(f"it has layers of the {elsewhere[0]} too, which is not merged here")
    for component, module in denoisers(pipe).items():
        for name, layer in lora_files.layers(module, NAME):
            if layer.use_dora.get(NAME):
                raise ValueError("it is a DoRA, whose magnitudes are no difference of weights")
            if layer.lora_bias.get(NAME):
                raise ValueError("it has biases besides its LoRA")
            yield (component, name), layer
