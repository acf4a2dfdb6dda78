"""Pictures as arrays: strips of frames, grids, frames of one size."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def strips(frames: NDArray[np.uint8], most: int = 5) -> NDArray[np.uint8]:
    """Videos (n, F, H, W, 3) as pictures: up to `most` evenly spaced frames side by side; pictures (F = 1) as they are."""
    count = frames.shape[1]
    chosen = np.linspace(0, count - 1, min(count, most)).round().astype(np.int64)
    return np.concatenate([frames[:, k] for k in chosen], axis=2)


Pixels = NDArray[np.uint8]


COLUMNS = 6
SMALL = 160  # pixels of a side up to which pages show a picture pixel by pixel


def spread(count: int, wanted: int) -> NDArray[np.int64]:
    """Up to `wanted` of the indices below `count`, evenly spread, the first and the last among them."""
    return np.linspace(0, max(0, count - 1), min(wanted, count)).astype(np.int64)


def address(pixels: Pixels) -> str:
    """A picture (H, W, 3) as an address that holds it, for pages: a small one as it is, of a larger one a copy of 2 `SMALL` pixels."""
    image, file = Image.fromarray(pixels), io.BytesIO()
    if small(pixels.shape):
        image.save(file, "PNG", optimize=True)
        kind = "png"
    else:
        image.thumbnail((2 * SMALL, 2 * SMALL))
        image.save(file, "JPEG", quality=85)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def small(shape: Sequence[int]) -> bool:
    """Whether a picture of this shape (H, W, ...) is one of which every pixel is to be seen."""
    return max(shape[:2]) <= SMALL


def grid(images: Pixels, columns: int = COLUMNS, gap: int = 2) -> Image.Image:
    """Pictures (n, H, W, 3) in rows, white between them; small ones are doubled until 128 pixels wide."""
    scale = 1
    while images.shape[2] * scale < 128:
        scale *= 2
    images = images.repeat(scale, 1).repeat(scale, 2)
    n, height, width, _ = images.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for k, image in enumerate(images):
        y, x = k // columns * (height + gap), k % columns * (width + gap)
        sheet[y : y + height, x : x + width] = image
    return Image.fromarray(sheet)


def framed(pictures: Sequence[Pixels]) -> Pixels:
    """Pictures (H, W, 3) of any sizes as one array (n, H, W, 3), each in the upper left of white."""
    height, width = (max(picture.shape[k] for picture in pictures) for k in (0, 1))
    sheets = np.full((len(pictures), height, width, 3), 255, np.uint8)
    for sheet, picture in zip(sheets, pictures, strict=True):
        sheet[: picture.shape[0], : picture.shape[1]] = picture
    return sheets
