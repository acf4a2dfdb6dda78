"""A run's evaluation: fixed prompts and noises, sampled deterministically, judged, kept as files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from diffalign.errors import Unscored
from diffalign.evaluation.results import Evaluation, Summary
from diffalign.protocols import Policy
from diffalign.report.pictures import spread, strips
from diffalign.rewards.base import to_uint8
from diffalign.rewards.scorer import Scorer
from diffalign.runtime import numbered
from diffalign.runtime.progress import Progress, silent
from diffalign.types import Floats, Plan, Prompts, Rollout, Rows, Scores, chunks


@dataclass
class FixedSet:
    """What a run is evaluated on, before and after and on the way, and what was found.

    prompts: what is sampled; scorer: its first reward decides what is best; folder: of the files, one an evaluation; max_invalid: share of
    the images that may be without a score; since: the last update after which something changed that evaluations depend on: those before
    are not compared with those after.
    """

    prompts: Prompts
    scorer: Scorer
    folder: Path
    seed: int
    max_invalid: float = 1.0
    since: int = 0
    _means: dict[int, dict[str, float]] = field(
        default_factory=dict
    )  # by update and reward, none where it gave no score

    def path(self, update: int) -> Path:
        """The file of the evaluation after `update` updates."""
        return self.folder / numbered.name(update, ".json")

    def read(self, update: int) -> Evaluation | None:
        """An evaluation that was made; None if there is none.

        Raises:
            Fault: if its file is damaged.
        """
        return Evaluation.read(self.path(update)) if self.path(update).is_file() else None

    def summary(self, update: int) -> Summary | None:
        """What an evaluation found, with gains over the one before training if that is still there; None if none was made."""
        made = self.read(update)
        return None if made is None else made.summary(self._before(update), self._peaks(made))

    def _before(self, update: int) -> Evaluation | None:
        """The evaluation before training that one after `update` updates is compared with; None where there is none."""
        return self.read(0) if update and not self.since else None

    def keep(self, parts: Sequence[tuple[Rows, dict[str, Floats]]], update: int) -> Summary:
        """Keep an evaluation from parts: which images, and their scores by reward.

        Raises:
            Unscored: if too many images have no score, or none has.
        """
        made = joined(parts, self.prompts, update, self.scorer, self.max_invalid)
        self._means.pop(update, None)
        made.save(self.path(update), seed=self.seed, prompts=self.prompts.text)
        return made.summary(self._before(update), self._peaks(made))

    def best(self) -> int | None:
        """The update whose evaluation has the highest mean of the first reward; None before the second evaluation."""
        return self._highest(next(iter(self.scorer.rewards)), lambda update: update > self.since)

    def _highest(self, name: str, among: Callable[[int], bool]) -> int | None:
        """The earliest update, among some, whose evaluation has the highest mean of a reward; None if there is none."""
        files = numbered.files(self.folder, ".json")
        for update in files.keys() - self._means.keys():
            scores = Evaluation.read(files[update]).scores
            self._means[update] = {k: float(np.nanmean(v)) for k, v in scores.items() if np.isfinite(v).any()}
        means = {update: self._means[update][name] for update in files if among(update) and name in self._means[update]}
        return max(means, key=lambda update: (means[update], -update)) if means else None

    def _peaks(self, made: Evaluation) -> dict[str, Evaluation]:
        """By reward, the best of the evaluations before one that it is compared with."""
        least = self.since if self.since else -1  # those of an earlier stage judged other samples
        best = {name: self._highest(name, lambda update: least < update < made.update) for name in made.scores}
        read = {update: Evaluation.read(self.path(update)) for update in set(best.values()) if update is not None}
        return {name: read[update] for name, update in best.items() if update is not None}

    def shown(self, count: int) -> NDArray[np.int64]:
        """Indices of so many images, spread over the prompts: those that grids show."""
        return spread(len(self.prompts), count)


def joined(
    parts: Sequence[tuple[Rows, dict[str, Floats]]],
    prompts: Prompts,
    update: int,
    scorer: Scorer,
    max_invalid: float = 1.0,
) -> Evaluation:
    """An evaluation from parts: which prompts, and their scores by reward.

    Raises:
        Unscored: if a reward gave no score at all, or none for more than `max_invalid` of the samples.
    """
    whole = {name: np.empty(len(prompts)) for name in parts[0][1]}
    for rows, columns in parts:
        for name, values in columns.items():
            whole[name][np.asarray(rows, dtype=np.int64)] = values
    share = {name: float(np.isfinite(values).mean()) for name, values in whole.items()}
    if any(1 - given > max_invalid or not given for given in share.values()):
        raise Unscored(f"evaluation after update {update}: samples without a score, {scorer.unscored(whole)}")
    return Evaluation(update, whole, prompts.group)


@torch.no_grad()
def scores(policy: Policy, scorer: Scorer, prompts: Prompts, progress: Progress = silent) -> dict[str, Floats]:
    """Scores (n,) by reward of deterministic samples, in the order of the prompts."""
    begun: list[Callable[[], Scores]] = []
    done = 0
    progress("evaluating", 0, len(prompts))
    for part in _rollouts(policy, prompts):
        begun.append(scorer.begin(policy.decode(part, part.x[-1], whole=True), part.prompts))
        done += len(part.prompts)
        progress("evaluating", done, len(prompts))
    parts = [answer() for answer in begun]
    return {name: np.concatenate([np.empty(0), *(part.by_name[name] for part in parts)]) for name in scorer.rewards}


@torch.no_grad()
def pictures(policy: Policy, prompts: Prompts) -> NDArray[np.uint8]:
    """Deterministic samples (n, H, W, 3); of videos five frames side by side."""
    decoded = (policy.decode(part, part.x[-1], whole=True) for part in _rollouts(policy, prompts))
    return np.concatenate([strips(to_uint8(media)) for media in decoded])


@torch.no_grad()
def accompany(policy: Policy, prompts: Prompts, times: int) -> None:
    """Run the network as often as others do that hold it too and have more to draw."""
    for _ in range(times):
        next(_rollouts(policy, prompts))


def _rollouts(policy: Policy, prompts: Prompts) -> Iterator[Rollout]:
    """Deterministic samples, a micro-batch at a time."""
    plan = Plan.deterministic(policy.schedule.steps)
    for rows in chunks(len(prompts), policy.micro_batch):
        yield policy.rollout(prompts.select(rows), plan)
