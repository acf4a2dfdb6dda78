"""TensorBoard and Weights & Biases through accelerate; `metrics.jsonl` is always written besides."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Trackers:
    """Forwards numbers to the configured trackers; the config's check has seen that they are installed."""

    def __init__(self, names: list[str], folder: Path) -> None:
        self._trackers: list[Any] = []
        if not names:
            return
        from accelerate import PartialState, tracking

        PartialState(cpu=True)
        kinds: dict[str, Any] = {"tensorboard": tracking.TensorBoardTracker, "wandb": tracking.WandBTracker}
        for name in names:
            kind = kinds[name]
            folder.mkdir(parents=True, exist_ok=True)
            tracker = kind("diffalign", folder) if name == "tensorboard" else kind("diffalign", dir=str(folder))
            if hasattr(tracker, "start"):
                tracker.start()
            self._trackers.append(tracker)

    def log(self, values: dict[str, float], update: int) -> None:
        for tracker in self._trackers:
            tracker.log(values, step=update)
