"""TensorBoard, Weights & Biases and Trackio through accelerate; `metrics.jsonl` is always written besides."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from diffalign.runs.events import Began, Drawn, Evaluated, Listener, Updated
from diffalign.runtime import keys

PROJECT = "diffalign"


class Trackers(Listener):
    """Forwards numbers and pictures to the configured trackers; the config's check has seen that they are installed.

    They are opened at the first number: before, the folder may not be the run's own yet.

    run: its name; settings: its config, dotted keys.
    """

    def __init__(
        self, names: Sequence[str], folder: Path, run: str = "", settings: dict[str, Any] | None = None
    ) -> None:
        self._names, self._folder, self._run, self._settings = list(names), folder, run, settings or {}
        self._after = 0

    def began(self, event: Began) -> None:
        self._after = event.number

    def updated(self, event: Updated) -> None:
        self._log(event.row, event.number)

    def evaluated(self, event: Evaluated) -> None:
        self._log(event.summary.row(), event.number)

    def drawn(self, event: Drawn) -> None:
        if event.drift is not None:
            self._log({keys.DRIFT: event.drift}, event.number)
        for tracker in self._opened:
            if tracker.name == "tensorboard":  # it has no captions
                tracker.log_images({"samples": event.images}, step=event.number, dataformats="NHWC")
                continue
            picture: Any = importlib.import_module(tracker.name).Image  # accelerate's own makes them without captions
            pictures = [picture(image, caption=text) for image, text in zip(event.images, event.captions, strict=True)]
            tracker.log({f"samples/{k}": one for k, one in enumerate(pictures)}, step=event.number)

    def _log(self, values: dict[str, float], update: int) -> None:
        for tracker in self._opened:
            tracker.log(values, step=update)

    @cached_property
    def _opened(self) -> list[Any]:
        if not self._names:
            return []
        from accelerate import PartialState, tracking

        PartialState(cpu=True)
        kinds: dict[str, Any] = {
            "tensorboard": tracking.TensorBoardTracker,
            "wandb": tracking.WandBTracker,
            "trackio": tracking.TrackioTracker,
        }
        opened = []
        for name in self._names:
            self._folder.mkdir(parents=True, exist_ok=True)
            tracker = kinds[name](PROJECT, **self._arguments(name))
            if hasattr(tracker, "start"):
                tracker.start()
            if name == "tensorboard":  # its own form of a config makes a run of its own
                tracker.tracker.add_text("config", "\n\n".join(f"{k}: {v}" for k, v in self._settings.items()), 0)
            opened.append(tracker)
        return opened

    def _arguments(self, name: str) -> dict[str, Any]:
        """What a tracker is opened with: a run that goes on is the same run there."""
        if name == "tensorboard":
            # What an earlier process logged of updates that are made again is not shown.
            return {"logging_dir": self._folder, "purge_step": self._after + 1 if self._after else 0}
        named = {"name": self._run, "config": self._settings, "resume": "allow"}
        if name == "trackio":
            return named
        own = hashlib.sha256(str(self._folder.absolute()).encode()).hexdigest()[:12]
        return {**named, "dir": str(self._folder), "id": own}
