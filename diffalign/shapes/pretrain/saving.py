"""What a recipe leaves: an ordinary diffusers folder in half precision, its scores, its log and a picture of samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

COLUMNS = 12  # of samples.png


def save(folder: Path, pipe: Any, report: dict[str, Any], shown: NDArray[np.uint8], lines: list[str]) -> None:
    """Write a finished pipeline, which becomes one of half precision; shown: pictures (tasks, n, H, W, 3), a row a task."""
    rows = [np.concatenate(row, 1) for row in shown[:, :COLUMNS]]
    Image.fromarray(np.concatenate(rows)).save(folder / "samples.png")
    pipe.to(torch.float16).save_pretrained(folder)
    _tidy(folder)
    (folder / "scores.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "pretrain.log").write_text("\n".join(lines) + "\n")


def _tidy(folder: Path) -> None:
    """Make transformers load the half-precision files as float32, as diffusers does: a plain load is then of one dtype. And leave
    out where parts came from."""
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        float32 = {"dtype": "float32"} if path.parent.name.startswith("text_encoder") else {}
        path.write_text(json.dumps({**config, **float32}, indent=2) + "\n")
