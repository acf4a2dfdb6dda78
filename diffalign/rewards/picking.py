"""A reward as a judge of drawn pictures, to keep the best of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from diffalign.errors import UserError
from diffalign.rewards import catalog
from diffalign.rewards.load import load
from diffalign.rewards.scorer import Scorer
from diffalign.types import Floats, Media, Prompts


def judge(name: str, fps: float | None = None) -> Callable[[Sequence[NDArray[Any]], Mapping[str, Any]], Floats]:
    """What scores pictures (H, W, 3) or videos (F, H, W, 3) of one caption, values in [0, 1], as they are written: in 256 steps. It takes
    them and the caption's entry, whose `prompt` is its text, and gives a score each, not a number where there is none.

    fps: frames per second of videos.

    Raises:
        UserError: if the reward is not known or does not load; the judge: if a caption lacks what the reward reads, or none of its pictures
            has a score.
    """
    known = catalog.known(name, "--by")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        reward = load(name, device=device)
    except UserError as error:
        raise UserError(*(f"--by: {line.removeprefix('rewards: ')}" for line in error.problems)) from error
    if reward.grouped:
        raise UserError(
            f"--by: {name} compares a caption's pictures with one another; allowed is a reward of each by itself"
        )
    scorer = Scorer({name: reward})

    def scores(shots: Sequence[NDArray[Any]], entry: Mapping[str, Any]) -> Floats:
        if unfit := known.unfit([dict(entry)]):
            raise UserError(f"--by: {name} {unfit}; allowed are captions of --prompts FILE.jsonl that have it")
        frames = np.stack([shot if shot.ndim == 4 else shot[None] for shot in map(np.asarray, shots)])
        pixels = torch.from_numpy(np.round(frames * 255)).to(device).permute(0, 1, 4, 2, 3).float() / 255
        if known.modality == "video" and frames.shape[1] == 1:
            raise UserError(f"--by: {name} judges videos, these are pictures; allowed is a reward for pictures")
        numbers = np.arange(len(shots))
        prompts = Prompts([entry["prompt"]] * len(shots), numbers, numbers, numbers, [dict(entry)] * len(shots))
        found = scorer.scores(Media(pixels, fps), prompts).by_name
        if not np.isfinite(found[name]).any():
            raise UserError(f"--by: {entry['prompt']!r} has pictures without a score, {scorer.unscored(found)}")
        return found[name]

    return scores
