"""BranchGRPO beside a flat rollout with as many leaves, on `shapes-sd3`: network rows and seconds, forward and backward.

    python benchmarks/branch_cost.py OUT.json

20 steps, noise on all but the last, 4 prompts of 16 leaves: splits 0, 3, 6, 9 of two children each against 16 flat samples.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch

from diffalign import config
from diffalign.prompts import book
from diffalign.runs import parts as build
from diffalign.training.trainer import Trainer

REPEATS = 5
RULES = {
    "flat": ("{name: flow_grpo}", 16, 64),
    "branch": ("{name: branch_grpo, splits: [0, 3, 6, 9]}", 1, 4),
}


def made(rule: str, size: int, micro_batch: int) -> Trainer:
    """A trainer that goes through the motions: its learning rate is 0."""
    overrides = [
        f"rule={rule}",
        "sampler.steps=20",
        f"prompts.group_size={size}",
        f"optimizer.micro_batch={micro_batch}",
    ]
    settings = config.load("flow_grpo/shapes-sd3", overrides)
    parts = build.build(settings)
    entries = settings.book.training
    return Trainer(
        settings.make_rule(),
        parts.policy,
        parts.scorer,
        torch.optim.AdamW(parts.policy.parameters.values(), lr=0.0),
        lambda update: book.draw(entries, 4, size, 0, update),
    )


def main(out: Path) -> None:
    """Measure, taking turns, print, and keep."""
    trainers = {name: made(*settings) for name, settings in RULES.items()}
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in trainers}
    for update in range(REPEATS + 1):
        for name, trainer in trainers.items():
            rows[name].append(trainer.update(update).metrics)
    keys = ("nfe", "nfe_backward", "seconds/sample", "seconds/train", "seconds/total")
    found = {name: {key: float(np.median([r[key] for r in found[1:]])) for key in keys} for name, found in rows.items()}
    ratios = {key: found["flat"][key] / found["branch"][key] for key in keys}
    for name, values in {**found, "flat over branch": ratios}.items():
        print(name, {key: round(value, 2) for key, value in values.items()})
    facts = {
        "date": date.today().isoformat(),
        "device": f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }
    out.write_text(json.dumps({**facts, "repeats": REPEATS, **found, "flat_over_branch": ratios}, indent=1) + "\n")


if __name__ == "__main__":
    started = time.perf_counter()
    main(Path(sys.argv[1]))
    print(f"{time.perf_counter() - started:.0f} s")
