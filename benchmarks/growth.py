"""Time and memory of an update after 10, 1,000 and 10,000 updates and with 10, 1,000 and 100,000 prompts: neither may grow.

The trainer is real, its policy is a Gaussian chain, so that what is measured is the bookkeeping: drawing, crediting, logging. Run it with
`python benchmarks/growth.py`; the result is benchmarks/results/growth.json.
"""

from __future__ import annotations

import json
import platform
import resource
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import torch

from diffalign.backends.toy import ToyPolicy
from diffalign.evaluation import intervals
from diffalign.prompts import book
from diffalign.rewards.scorer import Scorer
from diffalign.rules import RULES
from diffalign.runs.logs import Logs
from diffalign.training.trainer import Trainer

PLACES = (10, 1_000, 10_000)  # updates
PROMPTS = (10, 1_000, 100_000)
COUNTED = 20  # updates measured at each place


def reward(media, prompts):
    """Any number a sample."""
    return media.pixels.flatten(1).sum(1)


def measured(count: int, rule: str) -> dict[str, dict[str, float]]:
    """Milliseconds of an update, and bytes that stay in memory after it, at each place."""
    entries = [{"prompt": f"prompt {k}"} for k in range(count)]
    policy = ToyPolicy(process="flow_sde", noise_level=0.7, micro_batch=16)
    settings = RULES[rule].Settings
    optimizer = torch.optim.AdamW(policy.parameters.values(), lr=1e-4)

    def draw(update: int):
        return book.draw(entries, 4, 4, 0, update)

    trainer = Trainer(
        RULES[rule](settings()),
        policy,
        Scorer({"r": reward}),
        optimizer,
        lambda k: book.draw(entries, 4, 4, 0, k),
        notify=lambda line: None,
    )
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        logs, done = Logs(Path(folder)), 0

        def update() -> float:
            nonlocal done
            started = time.perf_counter()
            made = trainer.update(done)
            done += 1
            if made.judged is not None:
                logs.append_scores(done, *made.judged)
            logs.append({"update": done, **made.row()})
            logs.digests()
            return time.perf_counter() - started

        for place in PLACES:
            while done < place - COUNTED:
                update()
            times = [update() for _ in range(min(COUNTED, place))]
            tracemalloc.start()
            update()
            before = tracemalloc.get_traced_memory()[0]
            for _ in range(COUNTED):
                update()
            stays = (tracemalloc.get_traced_memory()[0] - before) / COUNTED
            tracemalloc.stop()
            found[str(place)] = {"ms": round(1e3 * float(np.median(times)), 2), "bytes_that_stay": round(stays)}
    return found


def main() -> None:
    """Measure everything and write it down."""
    torch.set_num_threads(1)
    results = {f"{rule}, {count} prompts": measured(count, rule) for rule in ("flow_grpo", "ddpo") for count in PROMPTS}
    peaks = {}
    for count in PROMPTS:
        scores = np.random.default_rng(0).random(count * 2)
        started = time.perf_counter()
        intervals.mean(scores, np.repeat(np.arange(count), 2))
        peaks[str(count)] = {"s": round(time.perf_counter() - started, 2)}
    whole = {
        "an update after so many": results,
        "interval of a mean over so many prompts": peaks,
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "machine": f"{platform.machine()}, torch {torch.__version__}, one thread",
        "date": time.strftime("%Y-%m-%d"),
    }
    path = Path(__file__).parent / "results" / "growth.json"
    path.write_text(json.dumps(whole, indent=1) + "\n")
    print(json.dumps(whole, indent=1))


if __name__ == "__main__":
    main()
