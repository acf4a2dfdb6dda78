"""How a checkpoint's preprocessor file wants pictures: sizes and patches as `_qwen_pixels` makes them, with a gradient to the pixels.

The checkpoint's processors themselves take 8-bit pictures and keep no gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from reward_models import _qwen_pixels
from reward_models._qwen_pixels import Form


@dataclass(frozen=True)
class Patches:
    """least, most: pixels of a resized picture."""

    form: Form
    least: int
    most: int

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
            form = Form(
                patch=int(facts["patch_size"]),
                merge=int(facts["merge_size"]),
                frames=int(facts["temporal_patch_size"]),
                mean=tuple(facts["image_mean"]),
                std=tuple(facts["image_std"]),
            )
            least = int(size.get("shortest_edge") or facts["min_pixels"])
            return cls(form, least, int(size.get("longest_edge") or facts["max_pixels"]))
        except KeyError as error:
            raise ValueError(f"{source}: its preprocessor file lacks {error}, which those of Qwen-VL have") from error

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing."""
        return _qwen_pixels.sides(height, width, self.least, self.most, self.form.factor)

    def tokens(self, height: int, width: int) -> int:
        """How many tokens a picture of these pixels becomes."""
        return math.prod(self.sides(height, width)) // self.form.factor**2

    def __call__(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Stills (N, 3, H, W) in [0, 1] to patches (N, gh gw, 3 frames patch patch), and the grid (gh, gw)."""
        shown = _qwen_pixels.resized(pixels[:, None], self.least, self.most, self.form.factor)
        flat, grid = _qwen_pixels.patches(shown, self.form)
        _, high, wide = grid[0].tolist()
        return flat.reshape(len(pixels), high * wide, -1), (high, wide)
