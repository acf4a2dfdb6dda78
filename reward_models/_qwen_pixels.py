"""Pictures and videos as Qwen2-VL's vision tower takes them: sizes, frames, patches. A tensor path all the way, with a gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PER_SECOND, FEWEST, MOST = 2.0, 4, 768  # frames that judges of videos see


@dataclass(frozen=True)
class Form:
    """What a checkpoint's preprocessor file says: pixels of a patch's side, patches that become one token a side, frames of a patch, and
    what colours are normalised by."""

    patch: int
    merge: int
    frames: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def factor(self) -> int:
        """Pixels of a token's side."""
        return self.patch * self.merge


def sides(height: int, width: int, least: int, most: int, factor: int) -> tuple[int, int]:
    """The size that a picture is shown in: sides in multiples of `factor`, least to most pixels, the aspect kept as near as that allows."""
    shown = [max(factor, round(side / factor) * factor) for side in (height, width)]
    scale = math.sqrt(height * width / most)
    if shown[0] * shown[1] > most:
        shown = [max(factor, math.floor(side / scale / factor) * factor) for side in (height, width)]
    elif shown[0] * shown[1] < least:
        scale = math.sqrt(least / (height * width))
        shown = [math.ceil(side * scale / factor) * factor for side in (height, width)]
    return shown[0], shown[1]


def moments(count: int, fps: float) -> Tensor:
    """Indices of the frames that are seen of `count` at `fps` a second: two a second of real time, an even number, four at least, both ends
    among them.

    Raises:
        ValueError: if there are fewer than four frames.
    """
    if count < FEWEST:
        raise ValueError(f"got videos of {count} frames, allowed are {FEWEST} and more")
    wanted = min(max(count / fps * PER_SECOND, FEWEST), min(MOST, count) // 2 * 2)
    return torch.linspace(0, count - 1, round(wanted / 2) * 2).round().long()


def resized(pixels: Tensor, least: int, most: int, factor: int) -> Tensor:
    """(N, F, 3, H, W) in [0, 1] in the size of `sides`; bicubic with antialiasing, as PIL does it but for the rounding to 8 bits."""
    size = sides(pixels.shape[-2], pixels.shape[-1], least, most, factor)
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    shrunk = F.interpolate(pixels.flatten(0, 1), size, mode="bicubic", antialias=True).clamp(0, 1)  # bicubic overshoots
    return shrunk.unflatten(0, pixels.shape[:2])


def patches(pixels: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Patches (N t h w, 3 frames patch patch) of pixels (N, F, 3, H, W) in [0, 1], and the grid (N, 3) of t, h and w.

    A still is doubled, and so is the last frame of an odd number; patches of one token are neighbours.
    """
    mean, std = (pixels.new_tensor(values)[:, None, None] for values in (form.mean, form.std))
    pixels = (pixels - mean) / std
    if short := -pixels.shape[1] % form.frames:
        pixels = torch.cat([pixels, pixels[:, -1:].expand(-1, short, -1, -1, -1)], dim=1)
    n, f, _, height, width = pixels.shape
    t, h, w = f // form.frames, height // form.patch, width // form.patch
    m, p = form.merge, form.patch
    cut = pixels.reshape(n, t, form.frames, 3, h // m, m, p, w // m, m, p)
    flat = cut.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(n * t * h * w, 3 * form.frames * p * p)
    return flat, torch.tensor([[t, h, w]] * n, device=pixels.device)
