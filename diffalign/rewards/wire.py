"""The wire format of rewards behind a server.

A request is JSON: `prompts` (n texts), `metadata` (n objects), `fps` where it is known, and `media`: either {"format": "png", "data": n
lists of one base64 PNG a frame} or {"format": "raw", "shape": [n, frames, height, width, 3], "data": base64 of uint8}. The answer is
{"name": ..., "version": ..., "scores": n numbers, null where there is none}. Pixels travel as uint8 without loss, never pickled.
"""

from __future__ import annotations

import base64
import io
import math
import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from diffalign.errors import Fault, one_line, shown
from diffalign.rewards.base import to_uint8
from diffalign.types import Media


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


def scores_of(answer: Any, count: int) -> list[float]:
    """The scores in a server's answer, NaN where it has null.

    Raises:
        Fault: for anything but a list of `count` finite numbers or nulls, and for an answer that speaks of an error.
    """
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list) or answer.get("error"):
        raise Fault(f"answered {shown(answer)}, expected scores")
    if len(scores) != count:
        raise Fault(f"answered {len(scores)} scores for {count} samples")
    for score in scores:
        if score is not None and (type(score) not in (int, float) or not math.isfinite(score)):
            raise Fault(f"answered {shown(score)} among its scores, expected numbers and null")
    return [math.nan if score is None else float(score) for score in scores]


class TooMuch(ValueError):
    """More pixels than a request may have."""


def unpacked(given: Any, most: int = 2**28) -> torch.Tensor:
    """Pixels (n, F, 3, H, W) float in [0, 1] of what `packed` makes.

    most: bytes that they may take as uint8; a small PNG file can be a huge picture.

    Raises:
        TooMuch: if they take more, before they are decoded.
        ValueError: saying what is wrong with it.
    """
    if not isinstance(given, dict) or given.get("format") not in ("png", "raw"):
        raise ValueError("media: expected an object with format png or raw")
    frames = _raw(given, most) if given["format"] == "raw" else _pngs(given.get("data"), most)
    return torch.from_numpy(frames).permute(0, 1, 4, 2, 3).float().div_(255)


def _raw(given: dict[str, Any], most: int) -> NDArray[np.uint8]:
    data = _bytes(given.get("data"), "media.data")
    shape: Any = given.get("shape")
    if len(data) > most:
        raise TooMuch(f"media.data: {len(data)} bytes of pixels, allowed are {most}; send fewer samples")
    whole = isinstance(shape, list) and len(shape) == 5 and all(type(n) is int and n > 0 for n in shape)
    if not whole or shape[-1] != 3 or math.prod(shape) != len(data):
        raise ValueError(
            f"media: shape {shown(shape)} does not fit {len(data)} bytes; expected [n, frames, height, width, 3]"
        )
    return np.frombuffer(data, np.uint8).reshape(shape).copy()


def _pngs(samples: Any, most: int) -> NDArray[np.uint8]:
    from PIL import Image

    if not isinstance(samples, list) or not samples or not all(isinstance(s, list) and s for s in samples):
        raise ValueError("media.data: expected a list of lists of PNG files, one a frame")
    samples_read, taken = [], 0
    warnings.filterwarnings(
        "ignore", category=Image.DecompressionBombWarning
    )  # sizes are looked at before anything is decoded
    for sample in samples:
        frames = []
        for text in sample:
            try:
                with Image.open(io.BytesIO(_bytes(text, "media.data")), formats=("PNG",)) as picture:
                    taken += 3 * picture.width * picture.height
                    if taken > most:
                        raise TooMuch(f"media.data: over {most} bytes of pixels; send fewer samples, or smaller ones")
                    frames.append(np.asarray(picture.convert("RGB")))
            except (OSError, SyntaxError, Image.DecompressionBombError) as error:
                raise ValueError(f"media.data: not a PNG file ({one_line(error)})") from error
        if len({frame.shape for frame in frames}) > 1:
            raise ValueError("media.data: frames of one sample must have one size")
        samples_read.append(frames)
    if len({tuple(frame.shape for frame in frames) for frames in samples_read}) > 1:
        raise ValueError("media.data: samples of one request must have one size and number of frames")
    return np.stack([np.stack(frames) for frames in samples_read])


def _bytes(text: Any, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: not base64") from error
