"""The first frame of a video by the first of its latents alone, for pipelines whose decoder does not look ahead."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from diffalign.backends.seam import Seam
from diffalign.errors import UserError
from diffalign.models.encoders import PROBE

ONE_FRAME: dict[str, Any] = {"num_frames": 1}  # arguments of a pipeline's call that then expects one latent
# Largest difference, of the range of a frame's pixels: a quarter of a step of 8 bits at most. Wan's decoder is exact.
CLOSE = 1e-3


def decode(seam: Seam, text: list[str], x: Tensor) -> Tensor:
    """First frames (N, 1, 3, H, W) in [0, 1] of latents (N, C, F, H, W), with gradient to the first of F."""
    return seam.run(text, x[:, :, :1], (), None, output="pt", changed=ONE_FRAME)


@torch.no_grad()
def check(seam: Seam) -> None:
    """That a pipeline's first frame is the same by its first latent alone, found out on noise.

    Raises:
        UserError: if it is not, or if its latents are laid out otherwise.
    """
    if why := _unlike(seam):
        raise UserError(
            f"scoring.frames: got first_latent, this {type(seam.pipe).__name__} {why}; allowed are pipelines of videos whose decoder is "
            "causal in time, such as Wan's; first decodes all and shows the first frame"
        )


def _unlike(seam: Seam) -> str:
    """What is other than it has to be; empty if nothing is."""
    if not ONE_FRAME.keys() <= inspect.signature(type(seam.pipe).__call__).parameters.keys():
        return "makes no videos of so many frames as it is told"
    x, one = (
        seam.start([PROBE], [torch.Generator().manual_seed(0)], changed) for changed in (seam.arguments, ONE_FRAME)
    )
    if x.ndim != 5 or x[:, :, :1].shape != one.shape:
        return f"has latents of {tuple(x.shape)}, for one frame {tuple(one.shape)}, which are not (N, C, F, H, W)"
    whole = seam.run([PROBE], x, (), None, output="pt")
    first = whole[:, 0].float()
    apart = float((first - decode(seam, [PROBE], x)[:, 0].float()).abs().max() / (first.max() - first.min()))
    if not apart <= CLOSE:
        return (
            f"makes another first frame of its first latent alone than of all: pixels differ by {apart:.2g} of their range "
            f"(allowed {CLOSE:g})"
        )
    return ""
