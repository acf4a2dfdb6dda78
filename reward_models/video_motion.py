"""How much a video moves, and how evenly: of pixels alone, no model."""

from __future__ import annotations

from torch import Tensor

from diffalign.types import Media, Prompts

REWARDS = {
    "motion": {
        "object": "motion",
        "differentiable": True,
        "modality": "video",
        "about": "root mean square difference of neighbouring frames; flicker counts as motion",
        "range": "0 to 1",
        "known": (0.1357, 0.1524, 0.4123),
        "tolerance": 0.001,
    },
    "temporal_consistency": {
        "object": "temporal_consistency",
        "differentiable": True,
        "modality": "video",
        "about": "minus the root mean square of frames' second differences; a still video has the best",
        "range": "-2 to 0",
        "known": (-0.1816, -0.2343, -0.7147),
        "tolerance": 0.001,
    },
}
TINY = 1e-12  # under the root, whose slope at 0 is infinite


def motion(media: Media, prompts: Prompts) -> Tensor:
    """sqrt(mean (x_f+1 - x_f)^2), (N,).

    Raises:
        ValueError: for pictures.
    """
    return _root(_differences(media.pixels, 1))


def temporal_consistency(media: Media, prompts: Prompts) -> Tensor:
    """-sqrt(mean (x_f+1 - 2 x_f + x_f-1)^2), (N,).

    Raises:
        ValueError: for less than three frames.
    """
    return -_root(_differences(media.pixels, 2))


def _differences(pixels: Tensor, order: int) -> Tensor:
    if pixels.shape[1] <= order:
        raise ValueError(f"media of {pixels.shape[1]} frames, this reward is for videos of {order + 1} and more")
    return pixels.diff(n=order, dim=1)


def _root(x: Tensor) -> Tensor:
    return (x.square().flatten(1).mean(1) + TINY).sqrt()
