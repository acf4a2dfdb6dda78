"""What rewards on CLIP models share: pictures as the models were trained on them, tokens, weights.

A tensor path all the way: bicubic with antialiasing is what PIL does to within the rounding to 8 bits, and it has a gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffalign.runtime.extras import PARTS
from diffalign.runtime.files import HUB_ID

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
VOCABULARY = 49408
TRAINED = 50.0  # exp(logit_scale): training takes it from 14 to 100, where it is held


def crop(pixels: Tensor, size: int) -> Tensor:
    """Shortest side to `size`, then the centre: (N, 3, H, W) in [0, 1] to (N, 3, size, size)."""
    height, width = pixels.shape[-2:]
    if min(height, width) != size:
        scale = size / min(height, width)
        shape = (max(size, int(height * scale)), max(size, int(width * scale)))
        pixels = F.interpolate(pixels, shape, mode="bicubic", antialias=True).clamp(0, 1)  # bicubic overshoots
    top, left = (pixels.shape[-2] - size) // 2, (pixels.shape[-1] - size) // 2
    return pixels[..., top : top + size, left : left + size]


def pad(pixels: Tensor, size: int) -> Tensor:
    """Longest side to `size`, then black to a square: (N, 3, H, W) in [0, 1] to (N, 3, size, size).

    As the package hpsv2 does it: on tensors, so that bicubic's overshoot stays.
    """
    height, width = pixels.shape[-2:]
    if max(height, width) != size:
        scale = size / max(height, width)
        shape = (round(height * scale), round(width * scale))
        pixels = F.interpolate(pixels, shape, mode="bicubic", antialias=True)
    down, right = size - pixels.shape[-2], size - pixels.shape[-1]
    return F.pad(pixels, (right // 2, right - right // 2, down // 2, down - down // 2))


def normalised(pixels: Tensor) -> Tensor:
    """CLIP's mean and standard deviation."""
    mean, std = (pixels.new_tensor(values)[:, None, None] for values in (MEAN, STD))
    return (pixels - mean) / std


def open_clip() -> Any:
    """The package.

    Raises:
        ImportError: with the command that installs it.
    """
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(f"needs open_clip_torch: {PARTS['open_clip'].install}") from error
    return open_clip


@functools.cache
def _tokenizer(length: int) -> Any:
    made = open_clip().tokenizer.SimpleTokenizer(context_length=length)  # reads its vocabulary anew every time
    if made.vocab_size != VOCABULARY:
        raise ValueError(f"open_clip's tokenizer knows {made.vocab_size} tokens, CLIP's has {VOCABULARY}")
    return made


def tokens(texts: list[str], length: int = 77) -> Tensor:
    """CLIP's token ids (N, 77), padded with 0; the vocabulary comes with open_clip."""
    return _tokenizer(length)(texts)


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def once(texts: list[str], encode: Callable[[list[str]], Tensor]) -> Tensor:
    """Embeddings (N, D) of length 1, each text encoded once."""
    place = {text: index for index, text in enumerate(dict.fromkeys(texts))}
    return F.normalize(wide(encode(list(place))), dim=-1)[[place[text] for text in texts]]


def checkpointed(layers: Iterable[torch.nn.Module]) -> None:
    """Let layers keep only their inputs for the gradient, and run again for it."""
    for layer in layers:
        layer.forward = functools.partial(_again, layer.forward)  # type: ignore[method-assign]


def _again(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


Head = list[tuple[Tensor, Tensor]]  # weight and bias of linear layers
LAYERS = (
    0,
    2,
    4,
    6,
    7,
)  # of the aesthetic predictor's Sequential, which ImageReward has too; between them is dropout, and no activation


def head(weights: dict[str, Tensor], prefix: str = "") -> Head:
    """The five linear layers of a head on an embedding.

    Raises:
        KeyError: if one is not among the weights.
    """
    return [(weights[f"{prefix}layers.{k}.weight"], weights[f"{prefix}layers.{k}.bias"]) for k in LAYERS]


def through(layers: Head, x: Tensor) -> Tensor:
    """A head's score (N,) of embeddings (N, D), in float32: in half of that scores would be rounded to hundredths."""
    x = wide(x)
    with torch.autocast(x.device.type, enabled=False):
        for weight, bias in layers:
            x = F.linear(x, weight.to(x), bias.to(x))
    return x[:, 0]


def untrained(scale: Tensor) -> list[str]:
    """A line if CLIP's exp(logit_scale) is not that of a trained one."""
    value = float(scale.detach())
    return (
        [] if value > TRAINED else [f"its logit scale is {value:.1f}, a trained CLIP's is about 100: random weights?"]
    )


def fetched(name: str, place: str | None, repo: str, file: str | None = None) -> str:
    """Where weights are: a folder or file the user names, or the hub's (its name, or the file in its cache).

    Raises:
        FileNotFoundError: if there is nothing.
    """
    what = "a folder as the hub lays it out" if file is None else f"the file {file}"
    if place is not None:
        path = Path(place)
        if file is None and not path.exists() and HUB_ID.fullmatch(place):
            _reachable(name, place, "config.json", what)
            return place  # another repository of the hub
        if not (path.is_dir() if file is None else path.is_file()):
            raise FileNotFoundError(f"{place} is no {'folder' if file is None else 'file'}; allowed is {what}")
        return place
    _reachable(name, repo, file or "config.json", what)
    if file is None:
        return repo
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(repo, file)
    except Exception as error:  # no network, no such file, no permission: each has its own class
        raise FileNotFoundError(missing(name, repo, what)) from error


def _reachable(name: str, repo: str, file: str, what: str) -> None:
    """Ask the hub once where the cache has nothing: its own downloads try for half a minute before they say that there is no network.

    Raises:
        FileNotFoundError: if there is nothing to be had.
    """
    import httpx
    from huggingface_hub import constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(repo, file), str):
        return
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        httpx.head(constants.ENDPOINT, timeout=10)
    except (httpx.HTTPError, OSError) as error:
        raise FileNotFoundError(missing(name, repo, what)) from error


def missing(name: str, repo: str, what: str = "a folder as the hub lays it out") -> str:
    """The message where weights cannot be had."""
    return f"{repo} is not in the hub's cache and cannot be fetched; give {what} as {name}@PLACE"


class Towers:
    """CLIP of transformers, frozen, on the device of what it scores."""

    def __init__(self, name: str, repo: str, place: str | None = None) -> None:
        from transformers import CLIPModel

        source = fetched(name, place, repo)
        try:
            # In float32 whatever the file has: half precision would round scores by some thousandths.
            self.net = CLIPModel.from_pretrained(source, dtype=torch.float32).requires_grad_(False).eval()
        except OSError as error:
            if Path(source).is_dir():
                raise FileNotFoundError(f"{source} holds no CLIP model as the hub lays it out") from error
            raise FileNotFoundError(missing(name, source)) from error
        self.size: int = self.net.config.vision_config.image_size
        self.length: int = self.net.config.text_config.max_position_embeddings

    def cosine(self, pixels: Tensor, texts: list[str]) -> Tensor:
        """cos(text, picture) of pixels (N, 3, H, W) in [0, 1], (N,)."""
        return (self.image(pixels) * self.text(texts).to(pixels.device)).sum(1)

    def image(self, pixels: Tensor) -> Tensor:
        """Picture embeddings of length 1, (N, D)."""
        net = self.net.to(pixels.device)
        pooled = net.vision_model(pixel_values=normalised(crop(pixels, self.size))).pooler_output
        return F.normalize(wide(net.visual_projection(pooled)), dim=-1)

    @torch.no_grad()
    def text(self, texts: list[str]) -> Tensor:
        """Text embeddings of length 1, (N, D)."""
        return once(texts, self._encoded)

    def _encoded(self, texts: list[str]) -> Tensor:
        ids = tokens(texts, self.length).to(self.net.device)
        hidden = self.net.text_model(input_ids=ids).last_hidden_state
        # The end of a text has the highest id. transformers looks for config.eos_token_id, which old configs give wrongly.
        return self.net.text_projection(hidden[torch.arange(len(ids)), ids.argmax(-1)])

    def checkpoint(self) -> None:
        """Keep only the inputs of layers for the gradient."""
        checkpointed(self.net.vision_model.encoder.layers)

    def problems(self) -> list[str]:
        """What looks wrong with its weights."""
        return untrained(self.scale)

    def networks(self) -> list[torch.nn.Module]:
        """What may be moved between uses."""
        return [self.net]

    @property
    def scale(self) -> Tensor:
        """exp(logit_scale)."""
        return self.net.logit_scale.exp()
