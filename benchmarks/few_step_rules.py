"""Rules on a distilled model of four calls: reward, gold, sharpness, diversity along training, and other numbers of calls.

`python benchmarks/few_step_rules.py OUT.json FIGURE.png [SEED ...]`; goes on where OUT.json ends; three minutes a rule and seed.
All train on `shapes_pref`; `shapes_geneval` and `shapes_judge` are held out, and so are the captions.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign import config as configs
from diffalign.rewards import distances
from diffalign.rules import own_walk
from diffalign.runs import parts
from diffalign.runtime.distributed import ALONE
from diffalign.types import Plan, Prompts

FEW = ["model=shapes-turbo", "sampler.steps=4"]
ALL = ["rule.levels=null", "rule.first_level=false", "rule.times=3"]
OWN = ["rule.states=own", *ALL]
ANEW = ["rule.states=forward", *ALL]
NOISY = ["sampler.process=cps", "sampler.noise_level=0.9", "rule.noise=true"]
ARMS: dict[str, tuple[str, list[str]]] = {
    "awm, noise anew": ("awm/shapes-turbo", ANEW),
    "awm, own states": ("awm/shapes-turbo", OWN),
    "awm, anew, levels [0, 2)": (
        "awm/shapes-turbo",
        [*ANEW, "rule.levels=[0,2]", "rule.first_level=true", "rule.times=2"],
    ),
    "nft, noise anew": ("nft/shapes-turbo", ANEW),
    "nft, own states": ("nft/shapes-turbo", []),
    "awm, own states, uniform": ("awm/shapes-turbo", [*OWN, "rule.weight=uniform"]),
    "nft, own states, cps": ("nft/shapes-turbo", NOISY),
    "flow_grpo, cps": ("flow_grpo/shapes-turbo", []),
    "flow_grpo, cps, last step": ("flow_grpo/shapes-turbo", ["rule.last_step={weight: 0.01, ceiling: 1.0}"]),
    "truncated_bp, last call": ("truncated_bp/shapes-sd3", [*FEW, "rule.depth=1"]),
    "rlr": ("rlr/shapes-sd3", FEW),
}
EVERY, UPDATES, EACH = 10, 40, 8
SHOWN = (-0.12, 0.18)  # of the trained reward, in the figure
CALLS = (8, 20)  # other numbers of calls that the trained network is asked with
LAPLACIAN = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])


def sharpness(pixels: Tensor) -> float:
    """Variance of the Laplacian of the grey picture (N, 1, 3, H, W), mean over pictures."""
    grey = pixels.flatten(0, 1).mean(1, keepdim=True)
    edges = torch.nn.functional.conv2d(grey, LAPLACIAN[None, None].to(grey))
    return float(edges.flatten(1).var(1).mean())


@torch.no_grad()
def seen(policy: Any, judges: Any, prompts: Prompts) -> dict[str, float]:
    """What fixed captions and noises come to: without noise, as a user draws."""
    rollout = policy.rollout(prompts, Plan.deterministic(policy.schedule.steps))
    media = policy.decode(rollout, rollout.x[-1])
    scores = judges.begin(media, prompts)()
    means = {name: float(np.nanmean(values)) for name, values in scores.by_name.items()}
    small = distances.small(media.pixels).double().numpy()
    apart = float(np.nanmean(distances.diversity(small, prompts.group)))
    return {**means, "sharpness": sharpness(media.pixels), "diversity": apart}


def trained(preset: str, overrides: list[str], seed: int) -> dict[str, Any]:
    """One run: what is seen every ten updates, and at its end with other numbers of calls, with D and q."""
    asked = [
        "rewards={shapes_pref: 1.0}",
        "eval_rewards=[shapes_geneval,shapes_judge]",
        "optimizer.lr=1e-3",
        "run_dir=unused",
        f"seed={seed}",
    ]
    config = configs.load(preset, [*overrides, *asked])
    made = parts.build(config, lambda line: None)
    prompts = config.book.fixed(EACH, 1234)
    trainer = parts.trainer(config, made, ALONE, lambda line: None)
    curve, rows = [seen(made.policy, made.judges, prompts)], 0.0
    started = time.perf_counter()
    for index in range(UPDATES):
        found = trainer.update(index).metrics
        rows += found["nfe"] + 2 * found["nfe_backward"]
        if (index + 1) % EVERY == 0:
            curve.append(seen(made.policy, made.judges, prompts))
    walk = own_walk(made.policy, config.book.draw(64, 1, 17, 0))
    others = {}
    for calls in CALLS:
        other = configs.load(preset, [*overrides, *asked, f"sampler.steps={calls}"])
        policy = parts.policy(other, made.pipe, made.policy.parameters)
        others[str(calls)] = seen(policy, made.judges, prompts)
    gap = None if walk is None else {"D": [*walk.gaps], "q": [*walk.shares]}
    return {"rows": rows, "seconds": time.perf_counter() - started, "curve": curve, "calls": others, "walk": gap}


def drawn(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Sharpness and gold against the trained reward, a line a run."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for number, (arm, runs) in enumerate(found.items()):
        for k, run in enumerate(runs.values()):
            curve = run["curve"]
            reward = [point["shapes_pref"] for point in curve]
            style = {
                "color": mpl.colormaps["tab20"](number),
                "marker": "o",
                "markersize": 3,
                "label": arm if k == 0 else None,
            }
            axes[0].plot(reward, [p["sharpness"] / curve[0]["sharpness"] for p in curve], **style)
            axes[1].plot(reward, [p["shapes_geneval"] for p in curve], **style)
    axes[0].set(xlabel="trained reward (shapes_pref)", ylabel="sharpness, of that before")
    axes[1].set(xlabel="trained reward (shapes_pref)", ylabel="gold (shapes_geneval)")
    for axis in axes:
        axis.set_xlim(*SHOWN)  # runs that break leave it to the left
    axes[0].axhline(1, color="grey", linewidth=0.8)
    axes[1].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)


def main(out: Path, figure: Path, seeds: list[int]) -> None:
    """Train what is not there yet, seed by seed, and draw it all."""
    head = {"date": time.strftime("%Y-%m-%d"), "updates": UPDATES, "every": EVERY, "runs": {arm: {} for arm in ARMS}}
    facts: dict[str, Any] = json.loads(out.read_text()) if out.exists() else head
    for seed in seeds:
        for arm, (preset, overrides) in ARMS.items():
            runs = facts["runs"].setdefault(arm, {})
            if str(seed) not in runs:
                runs[str(seed)] = run = trained(preset, overrides, seed)
                out.write_text(json.dumps(facts, indent=1) + "\n")
                first, last = run["curve"][0], run["curve"][-1]
                print(arm, seed, {k: (round(first[k], 3), round(last[k], 3)) for k in last}, run["walk"], flush=True)
    drawn(facts["runs"], figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [int(seed) for seed in sys.argv[3:]] or [0, 1, 2])
