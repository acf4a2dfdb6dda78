"""Fixed prompts and seeds, deterministic sampling, scores per image, and intervals that respect prompts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from diffalign.errors import Fault, Unscored, one_line
from diffalign.evaluation.intervals import interval
from diffalign.report.pictures import strips
from diffalign.rewards.base import Background, Reward, begin, check_media, to_uint8, unscored
from diffalign.runtime.files import write_text
from diffalign.types import Floats, Integers, Plan, Policy, Prompts, Rows, chunks


@dataclass(frozen=True)
class Evaluation:
    """Scores (n,) by reward after `update` updates, and which prompt each image belongs to (n,)."""

    update: int
    scores: dict[str, Floats]
    group: Integers

    def summary(self, before: Evaluation | None = None) -> dict[str, float]:
        """`eval/<name>` with `_lo`, `_hi`; against another evaluation of the same images also the paired `_gain`."""
        row: dict[str, float] = {"eval/n": float(len(self.group))}
        for name, values in self.scores.items():
            pairs = [("", values)]
            if before is not None:
                pairs.append(("_gain", values - before.scores[name]))
            for suffix, numbers in pairs:
                found = interval(numbers, self.group)
                row[f"eval/{name}{suffix}"] = found.mean
                row[f"eval/{name}{suffix}_lo"], row[f"eval/{name}{suffix}_hi"] = found.low, found.high
        return row

    def save(self, path: Path, **facts: Any) -> None:
        data = {"update": self.update, "group": self.group.tolist(), **facts}
        data["scores"] = {name: values.tolist() for name, values in self.scores.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(data) + "\n")

    @classmethod
    def read(cls, path: Path) -> Evaluation:
        """Read what `save` wrote.

        Raises:
            Fault: if the file is damaged.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            scores = {name: np.asarray(values, np.float64) for name, values in data["scores"].items()}
            return cls(data["update"], scores, np.asarray(data["group"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise Fault(f"{path}: damaged ({one_line(error)}); delete it to go on without it") from error


def judged(keys: Iterable[str]) -> list[str]:
    """The `eval/<name>` keys among those of a summary: those with an interval that are no gain."""
    present = list(keys)
    return [key for key in present if f"{key}_lo" in present and not key.endswith("_gain")]


def joined(
    found: Sequence[tuple[Rows, dict[str, Floats]]],
    prompts: Prompts,
    update: int,
    rewards: Mapping[str, Reward],
    max_invalid: float = 1.0,
) -> Evaluation:
    """An evaluation from parts: which prompts, and their scores by reward.

    Raises:
        Unscored: if a reward gave no score at all, or none for more than `max_invalid` of the samples.
    """
    whole = {name: np.empty(len(prompts)) for name in found[0][1]}
    for rows, columns in found:
        for name, values in columns.items():
            whole[name][np.asarray(rows, dtype=np.int64)] = values
    share = {name: float(np.isfinite(values).mean()) for name, values in whole.items()}
    if any(1 - given > max_invalid or not given for given in share.values()):
        raise Unscored(f"evaluation after update {update}: samples without a score, {unscored(whole, rewards)}")
    return Evaluation(update, whole, prompts.group)


@torch.no_grad()
def scores(policy: Policy, rewards: dict[str, Reward], prompts: Prompts, micro_batch: int) -> dict[str, Floats]:
    """Scores (n,) by reward of deterministic samples, in the order of the prompts."""
    plan = Plan.deterministic(policy.schedule.steps)
    weights = dict.fromkeys(rewards, 1.0)
    background, begun = Background(), []
    for rows in chunks(len(prompts), micro_batch):
        part = policy.rollout(prompts.select(rows), plan)
        media = check_media(policy.decode(part, part.x[-1]))
        begun.append(begin(rewards, weights, media, part.prompts, background))
    parts = [answer() for answer in begun]
    return {name: np.concatenate([np.empty(0), *(part.by_name[name] for part in parts)]) for name in rewards}


@torch.no_grad()
def pictures(policy: Policy, prompts: Prompts, micro_batch: int) -> NDArray[np.uint8]:
    """Deterministic samples (n, H, W, 3); of videos five frames side by side."""
    plan = Plan.deterministic(policy.schedule.steps)
    shots = []
    for rows in chunks(len(prompts), micro_batch):
        part = policy.rollout(prompts.select(rows), plan)
        shots.append(strips(to_uint8(policy.decode(part, part.x[-1]))))
    return np.concatenate(shots)
