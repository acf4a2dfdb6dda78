"""What training samples look like at a config's noise level, beside deterministic ones from the same start."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from diffalign.config import Config
from diffalign.errors import UserError
from diffalign.report import pictures
from diffalign.report.pictures import strips
from diffalign.rewards.base import check_media, to_uint8
from diffalign.runs import parts as build
from diffalign.runtime.files import make_folder
from diffalign.runtime.randomness import Purpose, numpy_generator
from diffalign.types import Plan

PICTURES = 6


@torch.no_grad()
def write(config: Config, path: Path) -> list[str]:
    """Two rows of pictures: deterministic above, with the rule's noise below; returns what the rewards say of each.

    Raises:
        UserError: if the path is no picture's.
    """
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise UserError(f"--preview: got {str(path)!r}, allowed is a .png or .jpg file")
    make_folder(path.parent, "--preview")
    parts = build.build(config)
    plan = config.make_rule().plan(parts.policy.schedule, 0, numpy_generator(config.seed, Purpose.PLAN, 0))
    drawn = config.book.draw(PICTURES, 1, config.seed, 0)
    steps = parts.policy.schedule.steps
    noisy = Plan(steps, plan.noise, (), branch=(1,) * steps)
    rows, lines = [], []
    for name, chosen in (("deterministic", Plan.deterministic(steps)), ("with noise", noisy)):
        part = parts.policy.rollout(drawn, chosen)
        media = check_media(parts.policy.decode(part, part.x[-1]))
        rows.append(strips(to_uint8(media)))
        scores = parts.scorer.scores(media, drawn)
        means = ", ".join(f"{reward} {np.nanmean(values):.3f}" for reward, values in scores.by_name.items())
        lines.append(f"{name:14} {means}")
    pictures.grid(np.concatenate(rows), columns=PICTURES).save(path)
    on = [k for k, noise in enumerate(noisy.noise) if noise and parts.policy.schedule.std[k] > 0]
    return [
        *lines,
        f"{path}: deterministic above; below noise at steps {on or 'none'}, level {config.sampler.noise_level:g}",
    ]
