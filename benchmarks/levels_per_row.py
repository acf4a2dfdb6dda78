"""How much of the gradient's variance is due to noise levels that all samples of an update share.

    python benchmarks/levels_per_row.py OUT.json [--updates N]

`awm/shapes-sd3` after a few updates, its own loss. For each of many drawn updates, every sample's gradient at every level is taken, with a
noise of its own. Both ways of drawing `times` of the levels without replacement, one draw for all samples or one for each, have the same
mean over draws, and their variance given these gradients is a sum over them; so the total variance (trace of the covariance, over prompts,
samples, noises and levels) of both is known from the same numbers. Length and direction are of draws from them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffalign import config
from diffalign.prompts import book
from diffalign.protocols import TrainablePolicy
from diffalign.rules import AWM
from diffalign.runs import parts as build
from diffalign.training.sampled import Sampled
from diffalign.training.scoring import Clock
from diffalign.training.trainer import Trainer
from diffalign.types import Term

TIMES, BEFORE, DRAWS = (1, 3), 3, 16
WAYS = ("update", "row")


class Update:
    """What is kept of one update's gradients G_ik of N samples at K levels: their mean, what the draw of levels adds to its variance, and
    gradients at drawn levels."""

    def __init__(self, levels: int, rng: np.random.Generator) -> None:
        self.levels, self.rng = levels, rng
        self.by_level: torch.Tensor | None = None  # (K, P) sum over samples
        self.within, self.count = 0.0, 0  # sum over samples of the variance over levels
        self.drawn: dict[
            int, torch.Tensor
        ] = {}  # times -> (DRAWS, P), sums over samples of the mean over their own levels

    def add(self, own: torch.Tensor) -> None:
        """One sample's gradients (K, P)."""
        self.by_level = own.clone() if self.by_level is None else self.by_level + own
        self.within += float(own.var(0, correction=0).sum())
        self.count += 1
        for times in TIMES:
            chosen = torch.zeros(DRAWS, self.levels)
            for row in chosen:
                row[self.rng.choice(self.levels, times, replace=False)] = 1 / times
            self.drawn[times] = self.drawn.get(times, torch.zeros(1)) + chosen @ own

    def mean(self) -> torch.Tensor:
        assert self.by_level is not None
        return self.by_level.mean(0) / self.count

    def added(self, way: str, times: int) -> float:
        """Variance that the draw of `times` of K levels without replacement adds."""
        assert self.by_level is not None
        factor = (self.levels - times) / (self.levels - 1) / times
        if way == "row":
            return factor * self.within / self.count**2
        return factor * float((self.by_level / self.count).var(0, correction=0).sum())

    def gradients(self, way: str, times: int) -> torch.Tensor:
        """(DRAWS, P) gradients at drawn levels."""
        if way == "row":
            return self.drawn[times] / self.count
        assert self.by_level is not None
        chosen = [self.rng.choice(self.levels, times, replace=False) for _ in range(DRAWS)]
        return torch.stack([self.by_level[rows].mean(0) for rows in chosen]) / self.count


def of_update(sampled: Sampled, trainer: Trainer, levels: Sequence[int], rng: np.random.Generator) -> Update:
    """Every sample's gradient at every level."""
    found, rule, policy = Update(len(levels), rng), trainer.rule, trainer.policy
    terms = [Term(level, level, "forward", draw=int(rng.integers(1, 2**62))) for level in levels]
    assert sampled.credit is not None
    for row in range(len(sampled.rollout.prompts)):
        part = sampled.rollout.select([row])
        credit = sampled.credit.select(sampled.rollout.tree, [row])
        found.add(torch.stack([_gradient(rule, policy, term, part, credit) for term in terms]))
    return found


def _gradient(rule: Any, policy: TrainablePolicy, term: Term, part: Any, credit: Any) -> torch.Tensor:
    parameters = list(policy.parameters.values())
    value = rule.loss(term, policy, part, credit, None).value
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(value, parameters)])


def summary(updates: Sequence[Update]) -> dict[str, Any]:
    """Numbers for each way and `times`, and how much less the variance by row is: with its jackknife's standard error."""

    def variance(way: str, times: int, kept: Sequence[Update]) -> float:
        means = torch.stack([update.mean() for update in kept])
        shared = float(means.var(0, correction=1).sum())  # of prompts, samples and noises
        return shared + float(np.mean([update.added(way, times) for update in kept]))

    whole, found = torch.stack([update.mean() for update in updates]).mean(0), {}
    for times in TIMES:
        for way in WAYS:
            drawn = torch.cat([update.gradients(way, times) for update in updates])
            length = drawn.norm(dim=1)
            found[f"times {times}, {way}"] = {
                "variance": variance(way, times, updates),
                "of which levels": float(np.mean([update.added(way, times) for update in updates])),
                "length_variation": float(length.std() / length.mean()),
                "cosine_to_mean": float((drawn @ whole / length / whole.norm()).mean()),
            }

        def less(kept: Sequence[Update], times: int = times) -> float:
            return 1 - variance("row", times, kept) / variance("update", times, kept)

        n = len(updates)
        without = np.array([less([*updates[:k], *updates[k + 1 :]]) for k in range(n)])
        found[f"times {times}"] = {
            "less_by_row": less(updates),
            "standard_error": float(np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())),
        }
    return {"squared_norm_of_mean": float(whole.square().sum()), **found}


def main(out: Path, count: int) -> None:
    """Measure, print, keep."""
    settings = config.load("awm/shapes-sd3", ["rule.anchor=0"])  # it has no gradient where the copy is the policy
    parts, rule = build.build(settings), settings.make_rule()
    assert isinstance(rule, AWM)
    entries, given = settings.book.training, settings.prompts
    trainer = Trainer(
        rule,
        parts.policy,
        parts.scorer,
        torch.optim.AdamW(parts.policy.parameters.values(), lr=1e-3),
        lambda update: book.draw(entries, given.groups, given.group_size, 0, update),
    )
    for update in range(BEFORE):  # away from the fresh adapter, where half of the parameters have no gradient
        trainer.update(update)
    levels = rule.settings.candidates(parts.policy.schedule.steps)
    facts = {
        "date": date.today().isoformat(),
        "device": "CPU",
        "torch": torch.__version__,
        "config": "awm/shapes-sd3, rule.anchor: 0",
        "updates_before": BEFORE,
        "samples": given.groups * given.group_size,
        "levels": len(levels),
    }
    updates: list[Update] = []
    for index in range(BEFORE, BEFORE + count):
        sampled = trainer._sample(index, Clock(torch.device("cpu")))
        updates.append(of_update(sampled, trainer, levels, np.random.default_rng(index)))
        if len(updates) > 2:  # what a jackknife needs
            found = {**facts, "updates": len(updates), "draws_of_length": DRAWS * len(updates), **summary(updates)}
            out.write_text(json.dumps(found, indent=1) + "\n")
            print(json.dumps(found, indent=1), flush=True)


if __name__ == "__main__":
    reader = argparse.ArgumentParser()
    reader.add_argument("out", type=Path)
    reader.add_argument("--updates", type=int, default=16)
    asked = reader.parse_args()
    main(asked.out, asked.updates)
