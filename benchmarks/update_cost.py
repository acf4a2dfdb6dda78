"""What one update costs over the network alone: python benchmarks/update_cost.py [CONFIG] [key=value ...]

In one process, at equal micro-batch and threads, updates and pure network passes take turns. The pure passes call the denoiser
on the same numbers of rows with fixed inputs: forward without graph for sampling, forward and backward for training. They are made
twice: with LoRA, and without it, where the gradient goes to the latents alone.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffalign import config as configs
from diffalign.models import lora as adapters
from diffalign.runs.folder import open_run
from diffalign.runs.progress import Reporter
from diffalign.runs.session import Session

ROUNDS = 12


def captured_call(session: Session) -> tuple[Any, dict[str, Any]]:
    """The denoiser and the arguments of one of its calls on a full micro-batch."""
    (module,) = adapters.denoisers(session.parts.pipe).values()
    seen: list[dict[str, Any]] = []
    handle = module.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    prompts = session.trainer.draw(0)
    plan = session.trainer.rule.plan(session.policy.schedule, 0, np.random.default_rng(0))
    session.policy.rollout(prompts, plan)
    handle.remove()
    return module, seen[-1]


def passes(module: Any, call: dict[str, Any], forward: int, backward: int) -> tuple[float, float]:
    """Seconds of the calls without a gradient, and of those with one, which goes to the latents too."""
    latent = next(name for name in ("hidden_states", "sample", "x") if name in call)
    started = time.perf_counter()
    with torch.no_grad():
        for _ in range(forward - backward):
            module(**call)
    sampled = time.perf_counter()
    for _ in range(backward):
        module(**call | {latent: call[latent].detach().requires_grad_()})[0].mean().backward()
    return sampled - started, time.perf_counter() - sampled


@contextmanager
def bare(session: Session) -> Iterator[None]:
    """The network without LoRA, with a graph all the same."""
    layers = adapters.layers(session.parts.pipe)
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def main() -> None:
    """Measure, print, and keep the result with device and date."""
    name, *overrides = sys.argv[1:] or ["flow_grpo/shapes-sd3"]
    folder = tempfile.mkdtemp()
    settings = configs.load(name, [*overrides, f"run_dir={folder}", "evaluation.enabled=false"])
    session = Session(settings, open_run(settings, True), Reporter(quiet=True))
    module, call = captured_call(session)
    size = len(next(value for value in call.values() if isinstance(value, torch.Tensor)))  # guided rows included
    counts = session.trainer.update(0).metrics
    forward, backward = (int(counts[key]) // size for key in ("nfe", "nfe_backward"))
    rows: list[dict[str, float]] = []
    for index in range(1, ROUNDS + 1):
        update = session.trainer.update(index)
        metrics = update.metrics
        if update.flat:
            continue
        network = passes(module, call, forward, backward)
        with bare(session):
            without = passes(module, call, forward, backward)
        core, whole = metrics["seconds/sample"] + metrics["seconds/train"], metrics["seconds/total"]
        rows.append(
            {
                "core": core / sum(network),
                "whole": whole / sum(network),
                "core_over_bare": core / sum(without),
                "lora_sampling": network[0] / without[0],
                "lora_training": network[1] / without[1],
                "network_seconds": sum(network),
                "bare_seconds": sum(without),
            }
        )
    result = {
        "config": name,
        "overrides": overrides,
        "device": f"CPU, {platform.machine()}, {torch.get_num_threads()} threads",
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "rounds": len(rows),
        "rows_forward": forward * size,
        "rows_backward": backward * size,
        "median": {key: round(statistics.median(row[key] for row in rows), 4) for key in rows[0]},
        "all": rows,
    }
    print(json.dumps({k: v for k, v in result.items() if k != "all"}, indent=1))
    out = Path(__file__).parent / "results" / "update_cost.json"
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
