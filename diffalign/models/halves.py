"""A LoRA's tensors, looked at before anything is done with them: pairs of halves, of one rank, of finite numbers. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

# A half of a layer's LoRA in the names of diffusers and peft, of kohya, and of others.
_NAME = re.compile(r"(.+?)\.?_?lora(?:_linear_layer)?[._](?P<half>A|B|down|up)(?:\.default)?\.weight")
DOWN = {"A": True, "down": True, "B": False, "up": False}
FLOATS = ("float16", "bfloat16", "float32", "float64")
ENCODERS = re.compile(r"(lora_)?(te\d?_|te\d?\.|text_encoder)")  # keys of text encoders, which have layers of their own


def layers(tensors: Mapping[str, Any], finite: Callable[[Any], bool]) -> set[str]:
    """The denoisers' layers that a file's tensors are about, by the file's names for them.

    Raises:
        ValueError: if there is none, a half is missing, two halves do not fit, or numbers are not finite floats.
    """
    found: dict[str, dict[bool, Any]] = {}
    for key, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in FLOATS and not key.endswith("alpha"):
            raise ValueError(f"{key} holds {dtype}, allowed are {', '.join(FLOATS)}")
        if dtype in FLOATS and not finite(tensor):
            raise ValueError(f"{key} holds numbers that are not finite")
        if match := _NAME.fullmatch(key):
            found.setdefault(match[1], {})[DOWN[match["half"]]] = tensor
    if not found:
        raise ValueError("it holds no layer of a LoRA")
    for name, halves in found.items():
        pair(name, halves.get(True), halves.get(False))
    return {name for name in found if not ENCODERS.match(name)}


def pair(name: str, a: Any, b: Any) -> tuple[Any, Any]:
    """A layer's halves A and B, None where a file has none.

    Raises:
        ValueError: if one is missing, or they do not fit.
    """
    if a is None or b is None:
        raise ValueError(f"layer {name} has one half of a LoRA only")
    if len(a.shape) < 2 or len(b.shape) < 2 or a.shape[0] != b.shape[1]:
        raise ValueError(f"layer {name} has halves of {tuple(a.shape)} and {tuple(b.shape)}, which do not fit")
    return a, b
