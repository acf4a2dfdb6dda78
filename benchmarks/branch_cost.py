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

from diffalign import build, config, prompts
from diffalign.trainer import Trainer

REPEATS = 5
RULES = {
    "flat": ("{name: flow_grpo}", 16, 64),
    "branch": ("{name: branch_grpo, splits: [0, 3, 6, 9]}", 1, 4),
}


def main(out: Path) -> None:
    """Measure, print, and keep."""
    found = {}
    for name, (rule, size, micro_batch) in RULES.items():
        overrides = [
            f"rule={rule}",
            "sampler.steps=20",
            f"prompts.group_size={size}",
            f"optimizer.micro_batch={micro_batch}",
        ]
        settings = config.load("flow_grpo/shapes-sd3", overrides)
        parts = build.build(settings)
        entries = settings.training_prompts()
        trainer = Trainer(
            settings.make_rule(),
            parts.policy,
            parts.rewards,
            settings.rewards,
            torch.optim.AdamW(parts.policy.parameters.values(), lr=0.0),
            lambda update, size=size, entries=entries: prompts.draw(entries, 4, size, 0, update),
            micro_batch=micro_batch,
        )
        trainer.update(0)
        rows = [trainer.update(k) for k in range(1, REPEATS + 1)]
        found[name] = {
            "leaves": 64,
            "rows_forward": rows[0]["nfe"],
            "rows_backward": rows[0]["nfe_backward"],
            **{
                f"seconds_{p}": float(np.median([r[f"seconds/{p}"] for r in rows]))
                for p in ("sample", "train", "total")
            },
        }
        print(name, found[name], flush=True)
    ratios = {key: found["flat"][key] / found["branch"][key] for key in found["flat"] if key != "leaves"}
    print({key: round(value, 2) for key, value in ratios.items()})
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
