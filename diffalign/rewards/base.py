"""What a reward is: `reward(media, prompts)` gives one number a sample. Needs torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign.memory import out_of_memory
from diffalign.types import Fault, Media, Prompts, Scores, one_line

Reward = Callable[[Media, Prompts], "Tensor | Sequence[float]"]


def check_media(media: Media) -> Media:
    """The one image contract: (N, F, 3, H, W) float, finite, in [0, 1]; a small overshoot of rounding is allowed.

    Raises:
        Fault: if the pixels are anything else.
    """
    pixels = media.pixels
    if pixels.ndim != 5 or pixels.shape[2] != 3 or not pixels.is_floating_point():
        raise Fault(f"pictures: got {tuple(pixels.shape)} {pixels.dtype}, expected (N, F, 3, H, W) float")
    low, high = float(pixels.detach().amin()), float(pixels.detach().amax())
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise Fault(f"pictures: values in [{low:.3g}, {high:.3g}], expected [0, 1]")
    return media


def to_uint8(media: Media) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Pixels (N, F, 3, H, W) as (N, F, H, W, 3) uint8, rounded."""
    pixels = media.pixels.detach().clamp(0, 1).mul(255).round().to(torch.uint8)
    return pixels.permute(0, 1, 3, 4, 2).cpu().numpy()


def evaluate(rewards: dict[str, Reward], weights: dict[str, float], media: Media, prompts: Prompts) -> Scores:
    """Score media with every reward and add up by weight; a score that is not finite makes its sample invalid.

    Raises:
        Fault: if a reward returns the wrong number of scores, or fails.
    """
    by_name: dict[str, np.ndarray[Any, np.dtype[np.float64]]] = {}
    for name, reward in rewards.items():
        try:
            output = reward(media, prompts)
            values = output.detach().cpu().double().numpy() if isinstance(output, Tensor) else np.asarray(output, float)
        except (Exception, SystemExit) as error:  # whatever a user's function does
            if out_of_memory(error):
                raise  # the trainer answers it
            raise Fault(f"reward {name}: {one_line(error)}") from error
        if values.shape != (len(prompts),):
            raise Fault(f"reward {name}: returned shape {values.shape} for {len(prompts)} samples")
        by_name[name] = values
    total = sum((weights[name] * values for name, values in by_name.items()), np.zeros(len(prompts)))
    valid = np.isfinite(total)
    return Scores(by_name, np.where(valid, total, 0.0), valid, weights)
