"""What a reward is: `reward(media, prompts)` gives one number a sample. Needs torch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign.errors import Fault, one_line
from diffalign.runtime.memory import out_of_memory
from diffalign.types import Media, Prompts, Scores

Scored = np.ndarray[Any, np.dtype[np.float64]]  # (N,), NaN where there is no score
LARGEST = float(np.finfo(np.float32).max)
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


class Background:
    """One thread for each reward that says `background`: remote ones, and those on the CPU, score while sampling goes on."""

    def __init__(self) -> None:
        self._threads: dict[str, ThreadPoolExecutor] = {}

    def submit(self, name: str, work: Callable[[], Scored]) -> Callable[[], Scored]:
        """Begin some work; the answer waits for it."""
        thread = self._threads.setdefault(name, ThreadPoolExecutor(1, thread_name_prefix=f"reward {name}"))
        return thread.submit(work).result


def begin(
    rewards: dict[str, Reward], weights: dict[str, float], media: Media, prompts: Prompts, background: Background
) -> Callable[[], Scores]:
    """Begin to score media with every reward; the answer waits for those in the background and adds up by weight.

    A score that is not finite makes its sample invalid.

    Raises:
        Fault: (the answer too) if a reward returns the wrong number of scores, or fails.
    """
    aside = any(getattr(reward, "background", False) for reward in rewards.values())
    copy = Media(media.pixels.detach().cpu(), media.fps) if aside else media
    found: dict[str, Callable[[], Scored]] = {}
    for name, reward in rewards.items():
        if getattr(reward, "background", False):
            found[name] = background.submit(name, functools.partial(_scored, name, reward, copy, prompts))
        else:
            values = _scored(name, reward, media, prompts)
            found[name] = functools.partial(lambda values: values, values)

    def finish() -> Scores:
        by_name = {name: answer() for name, answer in found.items()}
        total = sum((weights[name] * values for name, values in by_name.items()), np.zeros(len(prompts)))
        valid = np.isfinite(total)
        return Scores(by_name, np.where(valid, total, 0.0), valid, weights)

    return finish


def evaluate(rewards: dict[str, Reward], weights: dict[str, float], media: Media, prompts: Prompts) -> Scores:
    """Score media with every reward and wait for all; see `begin`."""
    return begin(rewards, weights, media, prompts, Background())()


@torch.no_grad()
def _scored(name: str, reward: Reward, media: Media, prompts: Prompts) -> Scored:
    """One reward's scores (N,)."""
    try:
        output = reward(media, prompts)
        values = output.detach().cpu().double().numpy() if isinstance(output, Tensor) else np.asarray(output, float)
    except (Exception, SystemExit) as error:  # whatever a user's function does
        if out_of_memory(error):
            raise  # the trainer answers it
        raise Fault(f"reward {name}: {error if isinstance(error, Fault) else one_line(error)}") from error
    if values.shape != (len(prompts),):
        raise Fault(f"reward {name}: returned shape {values.shape} for {len(prompts)} samples")
    return np.where(np.abs(values) <= LARGEST, values, np.nan)  # sums of larger ones would not be finite


def greet(rewards: Mapping[str, Reward]) -> None:
    """Let rewards behind servers find out whether they will answer, before anything is begun.

    Raises:
        UserError: if an address is wrong.
        Fault: if nobody answers there.
    """
    for reward in rewards.values():
        if hasattr(reward, "greet"):
            reward.greet()


def unscored(by_name: Mapping[str, Scored], rewards: Mapping[str, Reward]) -> str:
    """Which rewards have samples without a finite score, how many, and what is known of why; empty if none."""
    found = []
    for name, values in by_name.items():
        if missing := int((~np.isfinite(values)).sum()):
            why = getattr(rewards.get(name), "said", "")
            found.append(f"{name}: {missing} of {len(values)}" + (f" ({why})" if why else ""))
    return ", ".join(found)
