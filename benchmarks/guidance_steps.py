"""Guidance on some steps only: what it saves, counted, and how far pictures are from those with guidance on every step.

`python benchmarks/guidance_steps.py OUT.json`; shapes-sd3 at guidance 3, ten steps, the test captions of all six tasks, the same noises.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffalign import config as configs
from diffalign.evaluation import fixed
from diffalign.runs import parts
from diffalign.types import Plan

PRESET, GUIDANCE, EACH = "awm/shapes-sd3", 3.0, 2
FORMS = {"every step": "null", "[0, 6]": "[0,6]", "[0, 3]": "[0,3]", "no step": "[0,0]"}


def drawn(steps: str) -> tuple[np.ndarray, float, int]:
    """Pictures (N, ...), the share that GenEval passes, and rows of the network for them."""
    overrides = [
        f"sampler.guidance_scale={GUIDANCE}",
        f"sampler.guidance_steps={steps}",
        "prompts.tasks=[]",
        "run_dir=unused",
    ]
    config = configs.load(PRESET, overrides)
    made = parts.build(config, lambda line: None)
    prompts = config.book.fixed(EACH, 0)
    before = made.policy.rows_forward
    rollout = made.policy.rollout(prompts, Plan.deterministic(config.sampler.steps))
    rows = made.policy.rows_forward - before
    pixels = [made.policy.decode(rollout.select([k]), rollout.select([k]).x[-1]).pixels for k in range(len(prompts))]
    scores = fixed.scores(made.policy, made.judges, prompts)
    return torch.cat(pixels).numpy(), float(np.nanmean(scores["shapes_geneval"])), rows


def main(out: Path) -> None:
    """Draw with each, against guidance on every step."""
    found: dict[str, Any] = {name: drawn(steps) for name, steps in FORMS.items()}
    whole, _, most = found["every step"]
    # How far pictures of the same caption are that differ by their noise, as a measure of the others.
    apart = float(np.sqrt(np.mean((whole[::EACH] - whole[1::EACH]) ** 2)))
    table = {
        name: {
            "rows": rows,
            "rows saved": round(1 - rows / most, 4),
            "root mean square difference of pixels": round(float(np.sqrt(np.mean((pixels - whole) ** 2))), 4),
            "shapes_geneval": round(gold, 4),
        }
        for name, (pixels, gold, rows) in found.items()
    }
    how = f"{PRESET} at guidance {GUIDANCE:g}, {len(whole)} pictures of all six tasks' test captions, one CPU"
    facts = {"date": time.strftime("%Y-%m-%d"), "how": how, "other noise": round(apart, 4), "table": table}
    out.write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
