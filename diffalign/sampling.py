"""`diffalign sample`: pictures from a run, an adapter folder or a model, through the plain diffusers pipeline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.processes import linear_sigmas
from diffalign.types import UserError, one_line


@dataclass(frozen=True)
class Source:
    """What to sample from: a model, its adapter folder if there is one, and the call's arguments."""

    model: str
    adapter: Path | None
    call: dict[str, Any]


def resolve(target: str) -> Source:
    """A run folder, a folder with a LoRA written by `train`, or a model.

    Raises:
        UserError: if it is none of them.
    """
    from diffalign.shapes import models

    path = Path(target)
    for folder in (path / "adapter", path):
        if (folder / "pytorch_lora_weights.safetensors").is_file():
            notes = _notes(folder)
            if "base_model" not in notes:
                raise UserError(f"sample: {folder} does not say its base model; only adapters written by diffalign do")
            return Source(notes["base_model"], folder, json.loads(notes["call"]))
    if (path / "config.yaml").is_file():
        raise UserError(f"sample: the run {target} has no adapter yet; train it to its end first")
    if models.path(target) or (path / "model_index.json").is_file():
        call = {"max_sequence_length": 1} if models.path(target) else {}
        return Source(target, None, call)
    if path.exists() or target.count("/") != 1:
        known = ", ".join(models.names())
        raise UserError(
            f"sample: got {target!r}, which is no run, adapter, model folder or hub id; embedded are {known}"
        )
    return Source(target, None, {})


def _notes(folder: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / "pytorch_lora_weights.safetensors", framework="np") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise UserError(f"sample: {folder} holds a damaged adapter: {one_line(error)}") from error


def sample(
    source: Source,
    prompts: Sequence[str],
    n: int = 4,
    seed: int = 0,
    out: Path | str = "samples",
    steps: int | None = None,
    guidance: float | None = None,
) -> list[Path]:
    """Write `n` pictures a prompt and a grid; picture k of a prompt uses `manual_seed(seed + k)`.

    Raises:
        UserError: if `out` cannot be written, or the model or adapter does not load.
    """
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: got {str(out)!r}, cannot write there ({error.strerror})") from error
    import numpy as np
    import torch

    from diffalign.backends import adapters, diffusers
    from diffalign.figures import grid

    pipe = diffusers.load(source.model, device="cuda" if torch.cuda.is_available() else "cpu")
    if source.adapter is not None:
        with adapters.quiet():
            pipe.load_lora_weights(source.adapter)
        if not pipe.get_active_adapters():
            raise UserError(f"sample: {source.adapter} loads nothing into {source.model}")
    call = dict(source.call)
    if guidance is not None:
        call["guidance_scale"] = guidance
    if steps is not None:
        call["num_inference_steps"] = steps
        if "sigmas" in call:
            call["sigmas"] = linear_sigmas(steps)
    shots, paths = [], []
    for number, prompt in enumerate(prompts):
        for start in range(0, n, 8):
            seeds = range(seed + start, seed + min(start + 8, n))
            generators = [torch.Generator().manual_seed(s) for s in seeds]
            images = pipe([prompt] * len(generators), generator=generators, output_type="np", **call).images
            for s, image in zip(seeds, np.round(images * 255).astype(np.uint8), strict=True):
                path = out / f"{number:03d}_seed{s}.png"
                grid(image[None]).save(path) if max(image.shape) < 128 else _save(image, path)
                shots.append(image)
                paths.append(path)
    grid(np.stack(shots), columns=min(n, 8)).save(out / "grid.png")
    return [*paths, out / "grid.png"]


def _save(image: Any, path: Path) -> None:
    from PIL import Image

    Image.fromarray(image).save(path)
