"""What a finished pipeline draws for the captions of a split, judged exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from diffalign.ops import geneval
from diffalign.shapes import captions, motion
from diffalign.shapes.detector import detect

Metadata = dict[str, Any]
Report = dict[str, dict[str, float]]  # scores by task


def pictures(pipe: Any, call: Metadata, split: str, guidance: float, per_task: int, seed: int) -> tuple[Report, Any]:
    """Official, strict and partial score per task, and pictures (tasks, per_task, 64, 64, 3)."""
    rng = np.random.default_rng([seed, 3])
    scores, shown = {}, []
    for task in captions.TASKS:
        chosen = _chosen(captions.captions(task, split), per_task, rng)
        shots = _drawn(pipe, call, chosen, guidance, seed)
        found = [detect(image) for image in shots]
        pairs = list(zip(found, chosen, strict=True))
        scores[task] = {
            "official": float(np.mean([geneval.official(f.objects, m).correct for f, m in pairs])),
            "strict": float(np.mean([geneval.strict(f.objects, m, f.residue).correct for f, m in pairs])),
            "partial": float(np.mean([geneval.partial(f.objects, m) for f, m in pairs])),
        }
        shown.append(shots)
    scores["mean"] = {key: float(np.mean([row[key] for row in scores.values()])) for key in scores["position"]}
    return scores, np.stack(shown)


def videos(pipe: Any, call: Metadata, split: str, guidance: float, per_task: int, seed: int) -> tuple[Report, Any]:
    """Official and partial score per motion, and strips of frames (motions, per_task, 5 * 32, 32, 3)."""
    rng = np.random.default_rng([seed, 3])
    scores, shown = {}, []
    for name in motion.MOTIONS:
        chosen = _chosen([m for m in motion.captions(split) if m["motion"] == name], per_task, rng)
        shots = _drawn(pipe, call, chosen, guidance, seed)
        pairs = list(zip(shots, chosen, strict=True))
        scores[name] = {
            "official": float(np.mean([motion.official(video, m).correct for video, m in pairs])),
            "partial": float(np.mean([motion.partial(video, m) for video, m in pairs])),
        }
        shown.append([np.concatenate(video) for video in shots])
    scores["mean"] = {key: float(np.mean([row[key] for row in scores.values()])) for key in ("official", "partial")}
    return scores, np.stack(shown)


def _chosen(options: list[Metadata], count: int, rng: np.random.Generator) -> list[Metadata]:
    return [options[k] for k in rng.permutation(np.arange(count) % len(options))]


def _drawn(pipe: Any, call: Metadata, chosen: list[Metadata], guidance: float, seed: int) -> NDArray[np.uint8]:
    """What a plain call of the pipeline gives, uint8, one generator a sample."""
    generators = [torch.Generator().manual_seed(seed * 100_003 + k) for k in range(len(chosen))]
    texts = [m["prompt"] for m in chosen]
    drawn = pipe(texts, **call, guidance_scale=guidance, generator=generators, output_type="np", return_dict=False)[0]
    return np.round(np.asarray(drawn) * 255).astype(np.uint8)
