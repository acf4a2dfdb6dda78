"""Pictures as the vision towers of the Qwen-VL family take them, with a gradient to the pixels.

Sizes, mean and deviation are those of the checkpoint's own preprocessor file; its processors themselves take 8-bit pictures and keep no
gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Patches:
    """patch: pixels a side; merge: patches a side that make one token; temporal: frames a patch takes, a still is repeated; least, most:
    pixels of a resized picture; mean, std: of each colour."""

    patch: int
    merge: int
    temporal: int
    least: int
    most: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def read(cls, source: str) -> Patches:
        """Those of a checkpoint: a folder or the hub's name.

        Raises:
            OSError: if it has no preprocessor file.
            ValueError: if that file is of another family.
        """
        from transformers import BaseImageProcessor

        facts, _ = BaseImageProcessor.get_image_processor_dict(source)
        size = facts.get("size") or {}
        try:
            return cls(
                patch=int(facts["patch_size"]),
                merge=int(facts["merge_size"]),
                temporal=int(facts["temporal_patch_size"]),
                least=int(size.get("shortest_edge") or facts["min_pixels"]),
                most=int(size.get("longest_edge") or facts["max_pixels"]),
                mean=tuple(facts["image_mean"]),
                std=tuple(facts["image_std"]),
            )
        except KeyError as error:
            raise ValueError(f"{source}: its preprocessor file lacks {error}, which those of Qwen-VL have") from error

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing: nearest multiples of a token's side, within `least` and `most` pixels."""
        side = self.patch * self.merge
        found = [round(length / side) * side for length in (height, width)]
        if math.prod(found) > self.most:
            scale = math.sqrt(height * width / self.most)
            found = [max(side, math.floor(length / scale / side) * side) for length in (height, width)]
        elif math.prod(found) < self.least:
            scale = math.sqrt(self.least / (height * width))
            found = [math.ceil(length * scale / side) * side for length in (height, width)]
        return found[0], found[1]

    def tokens(self, height: int, width: int) -> int:
        """How many tokens a picture of these pixels becomes."""
        return math.prod(self.sides(height, width)) // (self.patch * self.merge) ** 2

    def __call__(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Stills (N, 3, H, W) in [0, 1] to patches (N, gh gw, 3 temporal patch patch), and the grid (gh, gw).

        Patches that make one token are neighbours in the order, as the towers expect.
        """
        sides = self.sides(*pixels.shape[-2:])
        if sides != tuple(pixels.shape[-2:]):
            pixels = F.interpolate(pixels, sides, mode="bicubic", antialias=True).clamp(0, 1)  # bicubic overshoots
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        n, p, m = len(pixels), self.patch, self.merge
        high, wide = sides[0] // p, sides[1] // p
        cells = ((pixels - mean) / std).reshape(n, 3, high // m, m, p, wide // m, m, p)
        ordered = cells.permute(0, 2, 5, 3, 6, 1, 4, 7)[:, :, :, :, :, :, None]  # n, rows, columns, m, m, 3, 1, p, p
        repeated = ordered.expand(*ordered.shape[:6], self.temporal, p, p)
        return repeated.reshape(n, high * wide, 3 * self.temporal * p * p), (high, wide)
