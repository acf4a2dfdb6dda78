"""From a judge's files to its network: the keys of its authors' versions, LoRA merged in, and nothing missing or left over."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reward_models import _bits, _clip

Weights = dict[str, Tensor]
HEAD = "rm_head."
UNREAD = "lm_head.weight"  # writes words, which judges do not
# transformers' names when the judges were trained -> those of today, of the network without its output layer
NAMES = (("visual.", "visual."), ("model.", "language_model."))
LORA = (".lora_A.weight", ".lora_B.weight")
ROTARY = ("visual.rotary_pos_emb", "language_model.rotary_emb")


def base(name: str, place: str | None, repo: str) -> str:
    """Where the base model's files are: PLACE/NAME, the repository's own NAME, if it is there, or the hub.

    Raises:
        FileNotFoundError: if they are neither here nor there.
    """
    if place is not None and not Path(place).is_dir():
        raise FileNotFoundError(
            f"{place} is no folder; allowed is {repo.rpartition('/')[2]} beside the judge's own files"
        )
    local = None if place is None else Path(place) / repo.rpartition("/")[2]
    return _clip.fetched(name, str(local) if local is not None and local.is_dir() else None, repo)


def read(path: str | Path) -> Weights:
    """A file's weights: safetensors, or a pickle of which nothing but tensors is taken.

    Raises:
        ValueError: if it is neither.
    """
    from safetensors.torch import load_file

    try:
        if str(path).endswith(".safetensors"):
            return dict(load_file(path))
        return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except FileNotFoundError:
        raise
    except Exception as error:  # torch's own message advises to run whatever the file holds
        raise ValueError(f"{path} cannot be read as weights") from error


def unwrapped(weights: Mapping[str, Tensor]) -> Weights:
    """Weights of a model in peft's wrapping under the names that they had before it."""
    return {
        key.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".default.", "."): value
        for key, value in weights.items()
    }


def merged(weights: Weights, scale: float) -> Weights:
    """Weights with their LoRA's change, scale B A, added in float32; what is changed keeps its type.

    Raises:
        ValueError: if a half of a LoRA, or what it changes, is not there.
    """
    plain = {key: value for key, value in weights.items() if not key.endswith(LORA)}
    layers = {key.removesuffix(end) for key in weights for end in LORA if key.endswith(end)}
    for layer in sorted(layers):
        parts = [layer + LORA[0], layer + LORA[1], layer + ".weight"]
        if lacking := [part for part in parts if part not in weights]:
            raise ValueError(f"the LoRA of {layer} lacks {lacking[0]}")
        a, b, weight = (weights[part].float() for part in parts)
        plain[parts[2]] = (weight + scale * b @ a).to(weights[parts[2]].dtype)
    return plain


def renamed(weights: Mapping[str, Tensor]) -> tuple[Weights, Weights]:
    """The network's weights under today's names, and the head's under its own."""
    body, head = {}, {}
    for key, value in weights.items():
        if key == UNREAD:
            continue
        if key.startswith(HEAD):
            head[key.removeprefix(HEAD)] = value
            continue
        for theirs, ours in NAMES:
            if key.startswith(theirs):
                key = ours + key.removeprefix(theirs)
                break
        body[key] = value
    return body, head


def strict(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Hold weights against what they are for.

    Raises:
        ValueError: if one is missing, has another shape, or is for nothing.
    """
    for word, names in (
        ("lacks", [key for key in expected if key not in given]),
        ("has what nothing takes,", [key for key in given if key not in expected]),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"{what} {word} {names[0]}{more}")
    for key, value in given.items():
        if value.shape != expected[key].shape:
            raise ValueError(
                f"{what} has {key} of {tuple(value.shape)}, the model's files want {tuple(expected[key].shape)}"
            )


def network(source: str, weights: Weights, rows: int, quantize: str = "none") -> Any:
    """Qwen2-VL without its output layer, frozen, in the type of its weights or quantised. source: of its config; rows: of its word
    embeddings.

    Raises:
        ValueError: if the weights are not this model's.
    """
    from transformers import Qwen2VLConfig, Qwen2VLModel
    from transformers.utils import logging

    config = Qwen2VLConfig.from_pretrained(source)
    config.text_config.vocab_size = rows
    with torch.device("meta"):
        expected = Qwen2VLModel(config).state_dict()
    words = "language_model.embed_tokens.weight"
    if words in weights and len(weights[words]) != rows:
        raise ValueError(
            f"the checkpoint knows {len(weights[words])} tokens, its tokenizer with the special ones {rows}"
        )
    strict(weights, expected, "the checkpoint")
    dtype = weights[words].dtype
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        net = Qwen2VLModel.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)
    finally:
        if shown:
            logging.enable_progress_bar()
    return _bits.quantised(rounded(net).requires_grad_(False).eval(), quantize)


class Angles(torch.nn.Module):
    """The vision tower's angles as its authors' version had them in training: with positions, frequencies and waves in bfloat16."""

    def __init__(self, plain: Any) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angle = (position_ids[..., None].float() * self.plain.inv_freq.to(x.device).float()).bfloat16()
        both = self.plain.recomposition_frequencies
        return both(angle.cos()), both(angle.sin())


def rounded(net: Any) -> Any:
    """A network whose rotary frequencies are bfloat16 numbers.

    The judges were trained by a version that put all of the model into bfloat16, these buffers too; at the end of a text the unrounded
    ones are angles away. Today's version keeps them in float32.

    Raises:
        ValueError: if this version's network has other parts.
    """
    if not all(hasattr(net.get_submodule(place), "recomposition_frequencies") for place in ROTARY):
        raise ValueError("this version of transformers has another Qwen2-VL; tested is 5.24")
    for place in ROTARY:
        rotary = net.get_submodule(place)
        rotary.inv_freq = rotary.inv_freq.bfloat16().float()
    net.visual.rotary_pos_emb = Angles(net.visual.rotary_pos_emb)
    return net
