"""What is tried next, by Optuna: its storage in the folder is the record of every trial, whatever ends this process."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from diffalign.comparing import units
from diffalign.comparing.methods import Method, Unit
from diffalign.comparing.running import TOLD, Runner
from diffalign.comparing.tuning.folder import Tuning
from diffalign.comparing.tuning.spaces import Range
from diffalign.errors import UserError
from diffalign.evaluation import intervals
from diffalign.evaluation.intervals import Interval
from diffalign.runs import guards
from diffalign.runs.logs import read_rows
from diffalign.runtime import keys

STORAGE = "optuna.log"  # a journal: a line a change
RANDOM = 5  # trials of a method before what is drawn depends on how those before did
WORST = -math.inf  # the score of a trial that failed
# Attributes of a trial in the storage.
VALUES, SCORE, WHY, SPENT = "values", "score", "why", "spent"


@dataclass(frozen=True)
class Open:
    """A trial that is not finished."""

    study: Study
    trial: Trial
    unit: Unit


class Study:
    """A method's trials."""

    def __init__(self, tuning: Tuning, method: Method) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.tuning, self.method = tuning, method
        self.ranges: list[Range] = tuning.ranges[method.folder]
        self.study = optuna.create_study(
            storage=storage(tuning.place), study_name=method.folder, direction="maximize", load_if_exists=True
        )
        if not self.study.trials:  # the config as it is comes first
            self.study.enqueue_trial({each.key: each.start for each in self.ranges})

    def begun(self) -> list[FrozenTrial]:
        """Those that were drawn, finished or not, by their numbers."""
        return [trial for trial in self.study.trials if trial.state != TrialState.WAITING]

    def take(self, number: int) -> Trial | None:
        """Trial `number`, drawn now or before; None if it is finished."""
        begun = self.begun()
        # What is drawn depends on the seed, the number and the scores so far, not on which process draws it.
        seed = zlib.crc32(f"{self.tuning.asked.seed} {self.method.folder} {number}".encode())
        self.study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=RANDOM)
        if number == len(begun):
            return self.study.ask()
        found = begun[number]
        return None if found.state.is_finished() else Trial(self.study, found._trial_id)  # numbers are no keys of it

    def values(self, trial: Trial) -> dict[str, float]:
        """What a trial's config has at the keys that are tried; drawn where it is not drawn yet."""

        def drawn(each: Range) -> float:
            if each.whole:
                return trial.suggest_int(each.key, int(each.low), int(each.high))
            return trial.suggest_float(each.key, each.low, each.high, log=True)

        values = {each.key: each.value(drawn(each)) for each in self.ranges}
        if VALUES not in trial.user_attrs:
            trial.set_user_attr(VALUES, values)
        return values

    def tell(self, trial: Trial, score: Interval | str, spent: dict[str, float] | None = None) -> None:
        """Write down how a trial ended; of one that failed, why."""
        if isinstance(score, str):
            trial.set_user_attr(WHY, score)
        else:
            trial.set_user_attr(SCORE, score.facts())
        trial.set_user_attr(SPENT, spent or {})
        self.study.tell(trial.number, WORST if isinstance(score, str) else score.value)


class _Held:
    """No lock: the folder is held by one process at a time. One that is killed would leave a lock of its own behind."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


def storage(place: Path) -> optuna.storages.JournalStorage:
    """What a folder's trials are written into."""
    return optuna.storages.JournalStorage(JournalFileBackend(str(place / STORAGE), _Held()))


def mend(place: Path) -> None:
    """Drop what a kill left of a line: the next one would be written behind it."""
    path = place / STORAGE
    if path.is_file() and not (written := path.read_bytes()).endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(written.rfind(b"\n") + 1)


class Search:
    """The trials of all methods, in turn: first trials, then second ones, so that a stop leaves as many of each.

    killed: those that a signal from outside ended, which says nothing of their settings.
    """

    def __init__(self, tuning: Tuning, jobs: int, say: Callable[[str], None]) -> None:
        self.tuning, self.jobs, self.say = tuning, jobs, say
        mend(tuning.place)
        self.studies = [Study(tuning, method) for method in tuning.methods]
        self.open: list[Open] = []
        self.killed: list[str] = []

    def units(self, runner: Runner) -> Iterator[Unit | None]:
        """What is to be trained, one after another; None while as many are open as run at a time."""
        for number in range(self.tuning.trials):
            for study in self.studies:
                while self.settle(runner) >= self.jobs:
                    yield None
                if (trial := study.take(number)) is None:
                    continue
                values = study.values(trial)
                try:
                    unit = self.tuning.trial(study.method, number, values)
                except UserError as error:
                    self._tell(study, trial, f"{study.method.label}, trial {number}", error.problems[0])
                    continue
                self.open.append(Open(study, trial, unit))
                if not unit.finished:  # its process may have outlived the one that drew it
                    yield unit

    def settle(self, runner: Runner) -> int:
        """Tell the storage of what ended; how many are open still."""
        for each in list(self.open):
            if each.unit.finished:
                found = score(each.unit, self.tuning)
                spent = {} if isinstance(found, str) else spent_by(each.unit)
                self._tell(each.study, each.trial, each.unit.method.label, found, spent)
            elif (code := runner.codes.get(each.unit)) is None:
                continue
            elif code < 0 or code in TOLD:
                self.killed.append(each.unit.method.label)
            else:
                self._tell(each.study, each.trial, each.unit.method.label, runner.failed[each.unit])
            self.open.remove(each)
        return len(self.open)

    def _tell(
        self, study: Study, trial: Trial, label: str, found: Interval | str, spent: dict[str, float] | None = None
    ) -> None:
        study.tell(trial, found, spent)
        said = f"counts as the worst: {found}" if isinstance(found, str) else f"gain {found.text('+.3f')}"
        self.say(f"{label}: {said}")


def score(unit: Unit, tuning: Tuning) -> Interval | str:
    """The gain that a trial is judged by, with its 95 % interval over prompts; or why it counts as the worst."""
    found = units.read(unit)
    if isinstance(found, str):
        return found
    settings: dict[str, Any] = unit.method.settings
    judge = tuning.asked.judge
    weights = settings["rewards"] if judge is None else {judge: 1.0}
    after, before = (
        sum(weight * np.asarray(found.evaluations[k].scores[name]) for name, weight in weights.items())
        for k in (found.updates, 0)
    )
    gain = intervals.gain(np.asarray(after), np.asarray(before), found.evaluations[0].group)
    if not math.isfinite(gain.value):
        return "no sample has a score both before and after"
    rows = [row for row in read_rows(unit.place) if keys.RATE in row]
    seen = guards.Seen(frozenset(settings["rewards"]), settings["guard"]["last"], rows)
    return guards.collapsed(seen) or gain


def spent_by(unit: Unit) -> dict[str, float]:
    """What a finished trial took, by kind."""
    found = units.read(unit)
    assert not isinstance(found, str)
    return {"updates": float(found.updates), **found.spent.get(found.updates, {})}
