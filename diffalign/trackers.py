"""TensorBoard and Weights & Biases through accelerate; `metrics.jsonl` is always written besides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffalign.config import Config
from diffalign.types import UserError


class Trackers:
    """Forwards numbers to the configured trackers.

    Raises:
        UserError: if a tracker is not installed.
    """

    def __init__(self, names: list[str], folder: Path, config: Config) -> None:
        self._trackers: list[Any] = []
        if not names:
            return
        from accelerate import PartialState, tracking

        PartialState(cpu=True)
        kinds: dict[str, tuple[Any, Any]] = {
            "tensorboard": (tracking.is_tensorboard_available, tracking.TensorBoardTracker),
            "wandb": (tracking.is_wandb_available, tracking.WandBTracker),
        }
        for name in names:
            available, kind = kinds[name]
            if not available():
                raise UserError(f"output.trackers: {name} is not installed; pip install 'diffalign[trackers]'")
            folder.mkdir(parents=True, exist_ok=True)
            tracker = kind("diffalign", folder) if name == "tensorboard" else kind("diffalign", dir=str(folder))
            if hasattr(tracker, "start"):
                tracker.start()
            self._trackers.append(tracker)

    def log(self, values: dict[str, float], update: int) -> None:
        for tracker in self._trackers:
            tracker.log(values, step=update)
