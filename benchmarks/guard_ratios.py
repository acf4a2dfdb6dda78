"""GRPO-Guard's ratios beside Flow-GRPO's on the same off-policy inner updates of `shapes-sd3`.

    python benchmarks/guard_ratios.py OUT.json OUT.png

One rollout, then optimiser steps of Flow-GRPO on it; after each, at every noisy step, the log-ratio as Flow-GRPO takes it and as
GRPO-Guard normalises it: mean and spread over samples, and how many lie beyond one clip range, on either side. The range is, for
each of the two, its spread over all steps, so that neither is helped by a lucky choice.
"""

from __future__ import annotations

import json
import sys
from datetime import date
from pathlib import Path

import numpy as np
import torch

from diffalign import config
from diffalign.prompts import book
from diffalign.rules import GRPOGuard
from diffalign.rules._trust import revisited
from diffalign.rules.grpo_guard import normalised
from diffalign.runs import parts as build
from diffalign.runtime.distributed import ALONE
from diffalign.runtime.randomness import numpy_generator
from diffalign.training.backward import Share, step
from diffalign.training.scoring import Clock
from diffalign.training.trainer import Trainer

UPDATES, SAMPLES = 4, 64


def main(out: Path, picture: Path) -> None:
    """Measure, print, keep, and draw."""
    settings = config.load("flow_grpo/shapes-sd3", [f"rule={{name: flow_grpo, inner_updates: {UPDATES}, clip: 1.0}}"])
    parts = build.build(settings)
    policy, rule = parts.policy, settings.make_rule()
    policy.micro_batch = SAMPLES
    entries = settings.book.training
    trainer = Trainer(
        rule,
        policy,
        parts.scorer,
        torch.optim.AdamW(policy.parameters.values(), lr=1e-3),
        lambda update: book.draw(entries, 4, SAMPLES // 4, 0, update),
    )
    for update in range(3):  # away from the fresh adapter, where half of the parameters have no gradient
        trainer.update(update)
    plan = GRPOGuard(GRPOGuard.Settings(step_weight="none")).plan(
        policy.schedule, 3, numpy_generator(0)
    )  # stores means
    drawn = trainer.draw(3)
    rollout = policy.rollout(drawn, plan)
    credit = rule.credit(rollout.tree, trainer.sampling.score(rollout, Clock(torch.device("cpu"))), drawn)
    rows = []
    for inner in range(UPDATES):
        trainer.optimizer.zero_grad()
        share = Share(plan.updates[0], rollout, [credit] * len(plan.updates[0]))
        trainer.backward.accumulate([share], first=inner == 0)
        step(trainer.optimizer, list(policy.parameters.values()), trainer.max_grad_norm, ALONE)
        rows.append([_measure(policy, rollout, term.start, credit) for term in plan.updates[0]])
    found = {kind: _summary(rows, kind) for kind in ("plain", "guard")}
    facts = {
        "date": date.today().isoformat(),
        "device": "CPU",
        "torch": torch.__version__,
        "samples": SAMPLES,
        "lr": 1e-3,
    }
    out.write_text(json.dumps({**facts, "inner_updates": UPDATES, **found}, indent=1) + "\n")
    _figure(found, picture)
    for kind, summary in found.items():
        last = summary["updates"][-1]
        print(kind, "mean / spread by step", [f"{m / s:+.2f}" for m, s in zip(last["mean"], last["std"], strict=True)])
        print(kind, "spread, largest over smallest", f"{max(last['std']) / min(last['std']):.1f}")
        print(kind, "beyond the range, low and high", f"{last['low']:.3f} {last['high']:.3f}")


@torch.no_grad()
def _measure(policy, rollout, step, credit) -> dict[str, np.ndarray]:  # type: ignore[no-untyped-def]
    now = revisited(step, policy, rollout, credit)
    change = now.now.mean - rollout.mean[step]
    guard = normalised(now.log_ratio, change, now.now.std, "full")
    return {"plain": now.log_ratio.double().numpy(), "guard": guard.double().numpy()}


def _summary(rows, kind) -> dict:  # type: ignore[no-untyped-def]
    updates = []
    for steps in rows:
        values = np.stack([step[kind] for step in steps])  # (steps, samples)
        clip = float(values.std())
        updates.append(
            {
                "mean": values.mean(1).tolist(),
                "std": values.std(1).tolist(),
                "clip": clip,
                "low": float((values < -clip).mean()),
                "high": float((values > clip).mean()),
            }
        )
    return {"updates": updates}


def _figure(found, picture: Path) -> None:  # type: ignore[no-untyped-def]
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2))
    for axis, (kind, title) in zip(
        axes, (("plain", "Flow-GRPO's log-ratio"), ("guard", "GRPO-Guard's log-ratio")), strict=False
    ):
        for number, update in enumerate(found[kind]["updates"], 1):
            mean, std = np.array(update["mean"]), np.array(update["std"])
            axis.errorbar(
                np.arange(len(mean)) + 0.08 * number,
                mean,
                yerr=std,
                fmt="o",
                markersize=3,
                capsize=2,
                label=str(number),
            )
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.set_title(f"{title}: mean and spread by step", fontsize=9)
        axis.set_xlabel("sampler step", fontsize=8)
        axis.ticklabel_format(axis="y", scilimits=(0, 0))
    axes[0].legend(title="inner update", fontsize=7, title_fontsize=7)
    for kind, style in (("plain", "o-"), ("guard", "s--")):
        for side, colour in (("low", "tab:red"), ("high", "tab:blue")):
            values = [update[side] for update in found[kind]["updates"]]
            name = {"plain": "Flow-GRPO", "guard": "GRPO-Guard"}[kind]
            axes[2].plot(range(1, len(values) + 1), values, style, color=colour, label=f"{name}, {side}", markersize=4)
    axes[2].set_title("share beyond one spread", fontsize=9)
    axes[2].set_xlabel("inner update", fontsize=8)
    axes[2].set_ylim(bottom=0)
    axes[2].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(picture, dpi=130)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
