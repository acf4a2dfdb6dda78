"""What a run draws and leaves behind: sample grids, curves, before and after, adapters."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffalign.config import Config
from diffalign.evaluation import fixed
from diffalign.evaluation.fixed import FixedSet
from diffalign.evaluation.results import Summary
from diffalign.models import lora_files
from diffalign.protocols import TrainablePolicy
from diffalign.report import figures
from diffalign.report.drawing import lacking
from diffalign.report.pictures import grid, spread
from diffalign.rewards import distances
from diffalign.runs import history
from diffalign.runs.card import notes, write_adapter
from diffalign.runs.events import Drawn
from diffalign.runs.folder import RunFolder
from diffalign.runs.grids import stored
from diffalign.runs.parts import Parts
from diffalign.runtime import numbered
from diffalign.runtime.files import whole
from diffalign.runtime.memory import fitting

WAIT = 30.0  # seconds between curves while a run goes on: they take about half a second
GALLERY = 4  # pictures on an adapter's page
AVERAGES = "ema"  # the shadow that is evaluated and saved where the config asks for averaged weights


def published(config: Config, policy: TrainablePolicy) -> AbstractContextManager[None]:
    """The weights that are evaluated and saved."""
    return nullcontext() if config.optimizer.ema is None else policy.shadow(AVERAGES)


@dataclass
class Outputs:
    """Writes into a run's folder; `say` hears what a user should know; history: what was changed on the way."""

    config: Config
    parts: Parts
    folder: RunFolder
    judged: FixedSet
    say: Callable[[str], None]
    history: list[dict[str, Any]] = field(default_factory=list)
    drawn: float = field(default_factory=time.perf_counter)  # when curves were, last

    @property
    def title(self) -> str:
        """Of figures."""
        return f"{self.config.rule['name']} on {self.config.model}, seed {self.config.seed}"

    def _sample(self, update: int, ending: str) -> Path:
        return self.folder / "samples" / numbered.name(update, f".{ending}")

    def adapter_beside(self, folder: Path, update: int) -> None:
        """The adapter after some updates, into a checkpoint's folder: every checkpoint can be sampled and exported."""
        with published(self.config, self.parts.policy):
            lora_files.save(self.parts.pipe, folder, notes(self.config, self.parts, update).written())

    def pictures(self) -> NDArray[np.uint8]:
        """The samples that grids show."""
        shown = self.judged.prompts.select(self.judged.shown(self.config.output.samples))
        with published(self.config, self.parts.policy):
            return fitting(self.parts.policy, lambda: fixed.pictures(self.parts.policy, shown), self.say)

    def samples(self, update: int, images: NDArray[np.uint8] | None = None) -> Drawn:
        """A grid of samples, and their pixels, after some updates; `images`: if they were drawn already."""
        images = self.pictures() if images is None else images
        (self.folder / "samples").mkdir(exist_ok=True)
        with whole(self._sample(update, "png")) as file:
            grid(images).save(file, "PNG")
        with whole(self._sample(update, "npz")) as file:
            np.savez_compressed(file, images=images)
        captions = [self.judged.prompts.text[k] for k in self.judged.shown(self.config.output.samples)]
        return Drawn(update, images, captions, self._drift(update, images))

    def _drift(self, update: int, images: NDArray[np.uint8]) -> float | None:
        """How far samples are from those before training; None where these are not there, or not the same ones."""
        first = self._sample(0, "npz")
        if not update or self.judged.since or not first.is_file():
            return None
        before = stored(first)
        if before.shape != images.shape:
            return None
        return float(distances.drift(*(distances.thumbnails(each[:, None]) for each in (images, before))).mean())

    def adapter(self, name: str, update: int, summary: Summary) -> None:
        """The adapter after some updates, as a folder of the run, with a card that says what its evaluation found."""
        with published(self.config, self.parts.policy):
            folder = write_adapter(
                self.config, self.parts, self.folder, summary, name, update, self.history, self._gallery(update)
            )
        # What is drawn comes after what was trained.
        self.curves()
        with whole(folder / "curves.png") as file:
            file.write((self.folder / "curves.png").read_bytes())

    def _gallery(self, update: int) -> list[tuple[str, NDArray[np.uint8]]]:
        """A few captions and their pictures after some updates, if they were drawn."""
        if not self._sample(update, "npz").is_file():
            return []
        images = stored(self._sample(update, "npz"))
        shown = self.judged.shown(self.config.output.samples)
        texts = [self.judged.prompts.text[k] for k in shown]
        few = spread(len(texts), GALLERY)
        return [(texts[k], images[k]) for k in few if k < len(images)]

    def best(self, update: int) -> None:
        """The adapter of the best evaluation so far, if that is the one after `update` updates."""
        if self.judged.best() == update:
            summary = self.judged.summary(update)
            assert summary is not None, "it is among those that were read"
            self.adapter("best", update, summary)

    def leave(self, update: int, summary: Summary) -> None:
        """Everything that a finished run has."""
        self.adapter("adapter", update, summary)
        self.before_after(update)
        if self.config.evaluation.every and self.config.evaluation.enabled:
            self.best(update)

    def watch(self) -> None:
        """Draw the curves anew, unless that was done a moment ago."""
        if time.perf_counter() - self.drawn >= WAIT:
            self.curves()

    def curves(self) -> None:
        """The run so far, from its log."""
        self.drawn = time.perf_counter()
        rewards, evaluations = history.curves(self.folder.logs.rows())
        shared = ("evaluation on prompts that are trained on, 95 % intervals",) if self.config.book.shared else ()
        place = self.folder / "curves.png"
        figures.curves(rewards, evaluations, place, self.title, *shared)

    def before_after(self, update: int) -> None:
        """The same samples before training and after, if both are there."""
        files = [self._sample(0, "npz"), self._sample(update, "npz")]
        if not all(path.is_file() for path in files):
            return
        before, after = (stored(path) for path in files)
        shown = self.judged.shown(self.config.output.samples)
        captions = [self.judged.prompts.text[k] for k in shown]
        if said := lacking(captions):
            self.say(said)
        path = self.folder / "before_after.png"
        figures.before_after(before, after, captions, self._passed(update, shown), path, self.title)

    def _passed(self, update: int, shown: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """The first held-out reward's verdicts on the samples that are shown, before and after; None where it gives none."""
        made = [self.judged.read(0), self.judged.read(update)]
        if not self.config.eval_rewards:
            return None
        columns = [each.scores[self.config.eval_rewards[0]][shown] for each in made if each is not None]
        verdicts = len(columns) == 2 and all(np.isin(column, (0, 1)).all() for column in columns)
        return (columns[0], columns[1]) if verdicts else None
