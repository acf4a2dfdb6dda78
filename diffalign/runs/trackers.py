"""TensorBoard and Weights & Biases through accelerate; `metrics.jsonl` is always written besides."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from diffalign.runs.events import Began, Evaluated, Listener, Updated


class Trackers(Listener):
    """Forwards numbers to the configured trackers; the config's check has seen that they are installed.

    They are opened at the first number: before, the folder may not be the run's own yet.
    """

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        self._names, self._folder, self._after = list(names), folder, 0

    def began(self, event: Began) -> None:
        self._after = event.number

    def updated(self, event: Updated) -> None:
        self._log(event.row, event.number)

    def evaluated(self, event: Evaluated) -> None:
        self._log(event.summary.row(), event.number)

    def _log(self, values: dict[str, float], update: int) -> None:
        for tracker in self._opened:
            tracker.log(values, step=update)

    @cached_property
    def _opened(self) -> list[Any]:
        if not self._names:
            return []
        from accelerate import PartialState, tracking

        PartialState(cpu=True)
        kinds: dict[str, Any] = {"tensorboard": tracking.TensorBoardTracker, "wandb": tracking.WandBTracker}
        opened, folder = [], self._folder
        for name in self._names:
            kind = kinds[name]
            folder.mkdir(parents=True, exist_ok=True)
            # What an earlier process logged of updates that are made again is not shown.
            purge = {"purge_step": self._after + 1} if self._after else {"purge_step": 0}
            tracker = (
                kind("diffalign", folder, **purge) if name == "tensorboard" else kind("diffalign", dir=str(folder))
            )
            if hasattr(tracker, "start"):
                tracker.start()
            opened.append(tracker)
        return opened
