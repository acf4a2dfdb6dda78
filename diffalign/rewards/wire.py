"""The wire format of rewards behind a server.

A request is JSON: `prompts` (n texts), `metadata` (n objects), `fps`, and `media`: either {"format": "png", "data": n lists of one
base64 PNG a frame} or {"format": "raw", "shape": [n, frames, height, width, 3], "data": base64 of uint8}. The answer is
{"name": ..., "version": ..., "scores": n numbers, null where there is none}. Pixels travel as uint8 without loss, never pickled.
"""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from diffalign.errors import one_line
from diffalign.rewards.base import to_uint8
from diffalign.types import Media

PIXELS = 2**28  # of a request, decoded: a small PNG file can be a huge picture


def packed(media: Media, form: str = "png") -> dict[str, Any]:
    """Media as JSON; `form` is png or raw."""
    frames = to_uint8(media)
    if form == "raw":
        return {"format": "raw", "shape": list(frames.shape), "data": base64.b64encode(frames.tobytes()).decode()}
    return {"format": "png", "data": [[_png(frame) for frame in sample] for sample in frames]}


def _png(frame: NDArray[np.uint8]) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode()


def unpacked(given: Any) -> torch.Tensor:
    """Pixels (n, F, 3, H, W) float in [0, 1] of what `packed` makes.

    Raises:
        ValueError: saying what is wrong with it.
    """
    if not isinstance(given, dict) or given.get("format") not in ("png", "raw"):
        raise ValueError("media: expected an object with format png or raw")
    frames = _raw(given) if given["format"] == "raw" else _pngs(given.get("data"))
    return torch.from_numpy(frames).permute(0, 1, 4, 2, 3).float() / 255


def _raw(given: dict[str, Any]) -> NDArray[np.uint8]:
    data = _bytes(given.get("data"), "media.data")
    shape: Any = given.get("shape")
    whole = isinstance(shape, list) and len(shape) == 5 and all(type(n) is int and n > 0 for n in shape)
    if not whole or shape[-1] != 3 or math.prod(shape) != len(data):
        raise ValueError(f"media: shape {shape} does not fit {len(data)} bytes; expected [n, frames, height, width, 3]")
    return np.frombuffer(data, np.uint8).reshape(shape).copy()


def _pngs(samples: Any) -> NDArray[np.uint8]:
    from PIL import Image

    if not isinstance(samples, list) or not samples or not all(isinstance(s, list) and s for s in samples):
        raise ValueError("media.data: expected a list of lists of PNG files, one a frame")
    samples_read, pixels = [], 0
    for sample in samples:
        frames = []
        for text in sample:
            try:
                with Image.open(io.BytesIO(_bytes(text, "media.data")), formats=("PNG",)) as picture:
                    pixels += picture.width * picture.height
                    if pixels > PIXELS:
                        raise ValueError(f"media.data: more than {PIXELS} pixels; send fewer samples")
                    frames.append(np.asarray(picture.convert("RGB")))
            except (OSError, SyntaxError, Image.DecompressionBombError) as error:
                raise ValueError(f"media.data: not a PNG file ({one_line(error)})") from error
        samples_read.append(frames)
    if len({tuple(frame.shape for frame in frames) for frames in samples_read}) > 1:
        raise ValueError("media.data: samples of one request must have one size and number of frames")
    return np.stack([np.stack(frames) for frames in samples_read])


def _bytes(text: Any, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: not base64") from error
