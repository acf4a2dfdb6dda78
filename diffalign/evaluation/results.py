"""What an evaluation found, as records: scores by image, and means with intervals and paired gains by reward."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.errors import Fault, one_line
from diffalign.evaluation import intervals
from diffalign.evaluation.intervals import Interval
from diffalign.runtime import keys
from diffalign.runtime.files import write_text
from diffalign.types import Floats, Integers


@dataclass(frozen=True)
class Judged:
    """A reward's mean over images; where there are such, its paired gain over the evaluation before training, and its paired change since
    the one, of those before it, with the best mean."""

    value: Interval
    gain: Interval | None = None
    since_best: Interval | None = None


@dataclass(frozen=True)
class Summary:
    """An evaluation of `count` images, by reward; empty where none was made."""

    count: int = 0
    rewards: dict[str, Judged] = field(default_factory=dict)

    def row(self) -> dict[str, float]:
        """The numbers by the keys they are logged under."""
        if not self.count:
            return {}
        row = {keys.COUNT: float(self.count)}
        for name, judged in self.rewards.items():
            for ending, part in (("", judged.value), ("_gain", judged.gain), ("_since_best", judged.since_best)):
                if part is not None:
                    row[keys.evaluated(name, ending)] = part.value
                    ends = zip(("_lo", "_hi"), part.ends or (), strict=False)
                    row |= {keys.evaluated(name, f"{ending}{end}"): value for end, value in ends}
        return row

    def gains(self) -> list[str]:
        """A line for every reward with a gain."""
        return [
            f"{keys.evaluated(name)}: gain {gain.text('+.3f')}"
            for name, judged in self.rewards.items()
            if (gain := judged.gain) is not None
        ]

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Summary:
        """What `row` wrote; empty for rows of updates."""
        parts: dict[str, dict[str, float]] = {}
        for key, value in row.items():
            if (place := keys.evaluation(key)) is not None:
                parts.setdefault(place[0], {})[place[1]] = float(value)

        def read(numbers: dict[str, float], ending: str) -> Interval:
            return Interval(numbers[ending], *(numbers.get(ending + end) for end in ("_lo", "_hi")))

        def maybe(numbers: dict[str, float], ending: str) -> Interval | None:
            return read(numbers, ending) if ending in numbers else None

        rewards = {
            name: Judged(read(numbers, ""), maybe(numbers, "_gain"), maybe(numbers, "_since_best"))
            for name, numbers in parts.items()
            if "" in numbers
        }
        return cls(int(row.get(keys.COUNT, 0)), rewards)


KEYS = {"update", "group", "seed", "prompts", "scores"}  # of an evaluation's file, besides its digest


def _digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


@dataclass(frozen=True)
class Evaluation:
    """Scores (n,) by reward after `update` updates, and which prompt each image belongs to (n,)."""

    update: int
    scores: dict[str, Floats]
    group: Integers

    def summary(self, before: Evaluation | None = None, best: Mapping[str, Evaluation] | None = None) -> Summary:
        """Means with intervals; against other evaluations of the same images, one before training and by reward its best one, also paired
        changes."""

        def change(name: str, other: Evaluation | None) -> Interval | None:
            if other is None or name not in other.scores:
                return None
            return intervals.gain(self.scores[name], other.scores[name], self.group)

        rewards = {
            name: Judged(intervals.mean(values, self.group), change(name, before), change(name, (best or {}).get(name)))
            for name, values in self.scores.items()
        }
        return Summary(len(self.group), rewards)

    def save(self, path: Path, **facts: Any) -> None:
        """Write it as JSON with some facts beside."""
        data = {"update": self.update, "group": self.group.tolist(), **facts}
        data["scores"] = {name: values.tolist() for name, values in self.scores.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({**data, "sha256": _digest(data)}) + "\n")

    @classmethod
    def read(cls, path: Path) -> Evaluation:
        """Read what `save` wrote.

        Raises:
            Fault: if the file is damaged.
        """
        try:
            data = json.loads(path.read_bytes().decode("ascii"))  # scores may be NaN
            # Earlier versions wrote no digest; a key that is none of these may have been it.
            signed = data.pop("sha256", "")
            if (signed or not data.keys() <= KEYS) and signed != _digest(data):
                raise ValueError("it is not what was written")
            scores = {name: np.asarray(values, np.float64) for name, values in data["scores"].items()}
            return cls(data["update"], scores, np.asarray(data["group"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise Fault(f"{path}: damaged ({one_line(error)}); delete it to go on without it") from error
