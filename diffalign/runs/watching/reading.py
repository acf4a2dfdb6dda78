"""What a run's folder says of the run, wherever the folder is: a copy says the same. Nothing is written, no lock is taken."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from diffalign import config as configs
from diffalign.config.limits import GuardConfig
from diffalign.errors import UserError, one_line
from diffalign.evaluation.results import Summary
from diffalign.models.notes import Notes
from diffalign.runs.budget import Budget, Spent
from diffalign.runs.folder import CONFIG, LOCK, SECTIONS
from diffalign.runs.guards import Alarm, alarms
from diffalign.runs.logs import METRICS, scanned
from diffalign.runs.progress import Pace
from diffalign.runs.store import STATE
from diffalign.runtime import keys, numbered
from diffalign.runtime.yaml_text import parse

Row = dict[str, Any]
WIDTH = 10  # updates in the running mean of a training reward


def is_run(place: Path) -> bool:
    """Whether a folder is a run's: a config alone is a method of a comparison, or a file of the user's."""
    return (place / CONFIG).is_file() and ((place / METRICS).is_file() or (place / LOCK).is_file())


@dataclass(frozen=True)
class Record:
    """A run as its folder has it. settings: the resolved config, completed where an earlier version wrote it; rows: of its log; broken:
    what could not be read, a line each."""

    place: Path
    settings: dict[str, Any]
    rows: Sequence[Row]
    broken: tuple[str, ...] = ()

    @cached_property
    def updates(self) -> list[Row]:
        """Rows of updates."""
        return [row for row in self.rows if keys.is_update(row)]

    @cached_property
    def evaluations(self) -> list[tuple[int, Summary]]:
        """What evaluations found, and after how many updates."""
        return [(row["update"], Summary.of_row(row)) for row in self.rows if keys.COUNT in row]

    @property
    def done(self) -> int:
        """How many updates are."""
        return self.updates[-1]["update"] if self.updates else 0

    @cached_property
    def finished(self) -> bool:
        """Whether the run came to its end: its adapter is that of its last update."""
        folder = self.place / "adapter"
        if not self.rows or not (folder / "curves.png").is_file():  # the last file of an adapter
            return False
        try:
            return Notes.read(folder).updates == self.done
        except ValueError:
            return False

    @cached_property
    def total(self) -> int | None:
        """How many updates there will be, as far as can be told."""
        if self.finished:
            return self.done
        spent = self._spent()
        own = self.settings.get("budget") or {}
        limits = {kind: own.get(kind) for kind in keys.SPENT}
        if limits["reward_calls"] is not None and not spent.reward_calls:
            return None
        return Budget(self.settings.get("updates"), **limits).reach(spent)[0] if self.done else None

    def _spent(self) -> Spent:
        """What the run took so far; the samples scored by what they were at the last evaluation or checkpoint."""
        rows = sum(row.get("nfe", 0.0) + 2 * row.get("nfe_backward", 0.0) for row in self.updates)
        seconds = sum(row.get(keys.TOOK, 0.0) for row in self.updates)
        known = [
            (row["update"], row[keys.SPENT["reward_calls"]]) for row in self.rows if keys.SPENT["reward_calls"] in row
        ]
        known += [(spent["updates"], spent["reward_calls"]) for spent in self._saved() if "reward_calls" in spent]
        mean = max(((k, calls / k) for k, calls in known if k), default=(0, 0.0))[1]
        return Spent(self.done, rows, round(mean * self.done), seconds)

    def _saved(self) -> list[dict[str, Any]]:
        """What the newest checkpoint says was spent, if there is one that can be read."""
        places = numbered.folders(self.place / "checkpoints")
        try:
            return [json.loads((places[max(places)] / STATE).read_bytes())["state"]["spent"]] if places else []
        except (OSError, ValueError, KeyError, TypeError):  # being written, or thinned out just now
            return []

    @property
    def left(self) -> str:
        """Seconds an update and how long it will take, as far as can be told; empty where the run is over."""
        seconds = [row[keys.TOOK] for row in self.updates if keys.TOOK in row]
        if self.finished or not seconds or self.total is None:
            return ""
        pace = Pace()
        pace.seconds += seconds
        return pace.told(max(0, self.total - self.done))

    def reward(self, rows: Sequence[Row]) -> float | None:
        """The mean of the training reward over some updates."""
        values = [row[keys.TOTAL] for row in rows if keys.TOTAL in row]
        return sum(values) / len(values) if values else None

    @property
    def last_reward(self) -> float | None:
        """Over the last updates."""
        return self.reward(self.updates[-WIDTH:])

    @cached_property
    def alarms(self) -> list[Alarm]:
        """What the guard rails raise on this log."""
        guard, trained = self.settings.get("guard") or {}, self.settings.get("rewards") or {}
        known = {key: value for key, value in guard.items() if key in GuardConfig.model_fields}
        return alarms(self.rows, list(trained), GuardConfig(**known))

    @property
    def name(self) -> str:
        """What the run is: rule and model."""
        return f"{self.settings['rule']['name']} on {self.settings['model']}"

    @property
    def run_dir(self) -> str:
        """The folder as the run's own settings call it: commands name this."""
        return str(self.settings.get("run_dir") or self.place)


def read(place: Path) -> Record:
    """A run's folder.

    Raises:
        UserError: if its config is damaged: nothing else says what the run is.
    """
    path = place / CONFIG
    try:
        settings = parse(path.read_text(encoding="utf-8"), str(path))
        if (
            not isinstance(settings, dict)
            or not settings.keys() >= SECTIONS
            or "name" not in (settings.get("rule") or {})
        ):
            raise ValueError("it is no run's")
        settings = configs.completed(settings)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: damaged ({one_line(error)})") from error
    rows, lines = scanned(place, METRICS)
    broken = [f"{METRICS}: line {', '.join(map(str, lines))} is no row of a run"] if lines else []
    return Record(place, settings, rows, tuple(broken))
