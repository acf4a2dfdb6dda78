"""Which networks are distilled: each embedded pipeline against its own walk, D and q of `ops.matching.against_own_walk` by level.

`python benchmarks/few_steps.py OUT.json`; two minutes on one busy CPU core. Captions are those that are trained on, noises are fresh.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from diffalign import config as configs
from diffalign.rules import own_walk
from diffalign.runs import parts

# model -> a preset of it, and the numbers of calls it is walked with
ASKED = {
    "shapes-turbo": ("awm/shapes-turbo", (4, 8)),
    "shapes-sd3": ("awm/shapes-sd3", (4, 8, 10)),
    "shapes-sd": ("ddpo/shapes-sd", (4, 8, 10)),
    "shapes-flux": ("truncated_bp/shapes-flux", (4, 8, 10)),
    "shapes-wan": ("flow_grpo/shapes-wan", (4, 8, 10)),
}
SAMPLES = 64


def asked(preset: str, calls: int) -> dict[str, list[float]]:
    """Levels, D and q at each of a pipeline walked with so many calls, noisiest first."""
    few = (
        "rule=nft",
        f"prompts.groups={SAMPLES // 2}",
        "prompts.group_size=2",
        f"optimizer.micro_batch={SAMPLES}",
        f"sampler.steps={calls}",
    )
    config = configs.load(preset, [*few, "run_dir=unused"])
    made = parts.build(config, lambda line: None)
    found = own_walk(made.policy, config.book.draw(SAMPLES, 1, 17, 0))
    assert found is not None
    sigma = [round(float(made.policy.schedule.sigma[level]), 4) for level in found.levels]
    return {"sigma": sigma, "D": [round(x, 4) for x in found.gaps], "q": [round(x, 4) for x in found.shares]}


def main(out: Path) -> None:
    """Ask all, and write what was found."""
    started = time.perf_counter()
    rows = {}
    for model, (preset, counts) in ASKED.items():
        for calls in counts:
            rows[f"{model}, {calls} calls"] = found = asked(preset, calls)
            print(model, calls, found, flush=True)
    head = {"date": time.strftime("%Y-%m-%d"), "samples": SAMPLES, "seconds": round(time.perf_counter() - started)}
    out.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
