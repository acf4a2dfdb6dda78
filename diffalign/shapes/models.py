"""The pipelines that ship with the package, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "weights"


def names() -> list[str]:
    """Names of the embedded pipelines, such as `shapes-sd3`."""
    return sorted(path.parent.name for path in FOLDER.glob("*/model_index.json"))


def path(name: str) -> Path | None:
    """Folder of an embedded pipeline, an ordinary diffusers folder; None if there is none of that name."""
    return FOLDER / name if name in names() else None


def call(name: str) -> dict[str, Any]:
    """Arguments of a pipeline's call that an embedded one is meant to be used with; none for other names."""
    calls: dict[str, dict[str, Any]] = {
        "shapes-sd3": {"max_sequence_length": 1},
        "shapes-turbo": {"max_sequence_length": 1, "num_inference_steps": 4, "guidance_scale": 1.0},
        "shapes-flux": {"max_sequence_length": 16, "height": 64, "width": 64},
        "shapes-wan": {"max_sequence_length": 16, "height": 32, "width": 32, "num_frames": 5},
    }
    return calls.get(name, {})
