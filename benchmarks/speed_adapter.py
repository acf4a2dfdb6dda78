"""A speed adapter, and a run on top of it: a LoRA is taught to reach in four steps what the base reaches in twenty, AWM then trains at
four steps with it under `lora.frozen`, and what AWM learnt is also drawn without it, at ten.

`python benchmarks/speed_adapter.py FOLDER OUT.json`; half an hour on one busy CPU core. The teaching is plain regression: mean squared
error of the last latents, the gradient through all four steps; the captions are those that are trained on, the judged ones are held out.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffalign import config as configs
from diffalign.evaluation import fixed
from diffalign.evaluation.results import Evaluation
from diffalign.models import lora, lora_files
from diffalign.models.notes import Notes
from diffalign.runs import parts, session
from diffalign.runs.folder import read_rows
from diffalign.types import Plan

PRESET = "awm/shapes-sd3"
FEW, TEACHER, MANY = 4, 20, 10  # steps of the student, of its teacher, of drawings without it
PAIRS, BATCH, STEPS, RATE, RANK = 768, 32, 250, 2e-3, 32
RATES = (1e-3, 3e-4)  # of AWM: the preset's, and a third


def built(folder: Path, *overrides: str) -> tuple[configs.Config, parts.Parts]:
    """The preset's policy with other settings."""
    config = configs.load(PRESET, [*overrides, f"run_dir={folder / 'unused'}"])
    return config, parts.build(config, lambda line: None)


def walked(pipe: Any, x: torch.Tensor, texts: list[str], sigmas: torch.Tensor) -> torch.Tensor:
    """The last latents (N, ...) of a walk along noise levels, with a graph."""
    embeds, _, pooled, _ = pipe.encode_prompt(texts, None, None, max_sequence_length=1)
    for now, then in itertools.pairwise(sigmas):
        time = (now * 1000).expand(len(x))
        given = {"encoder_hidden_states": embeds, "pooled_projections": pooled, "timestep": time}
        x = x + (then - now) * pipe.transformer(x, **given, return_dict=False)[0]
    return x


def taught(folder: Path) -> dict[str, float]:
    """Teach the speed adapter, and write it to a folder; mean squared errors before and after, on noises that were not taught."""
    config, teacher = built(folder, f"sampler.steps={TEACHER}", f"lora.rank={RANK}", f"lora.alpha={RANK}")
    prompts = config.book.draw(PAIRS, 1, 17, 0)
    begin, end = [], []
    for k in range(0, PAIRS, BATCH):
        part = teacher.policy.rollout(prompts.select(range(k, k + BATCH)), Plan.deterministic(TEACHER))
        begin.append(part.x[0])
        end.append(part.x[-1])
    begin, end = torch.cat(begin), torch.cat(end)
    _, student = built(folder, f"sampler.steps={FEW}", f"lora.rank={RANK}", f"lora.alpha={RANK}")
    held = prompts.select(range(BATCH))
    pipe, sigmas = student.pipe, torch.tensor([*(k / FEW for k in range(FEW, -1, -1))])
    own = student.policy.rollout(held, Plan.deterministic(FEW)).x[-1]
    with torch.no_grad():
        again = walked(pipe, begin[:BATCH], list(held.text), sigmas)
    assert float((own - again).abs().max()) < 1e-3, "the walk is not the pipeline's"
    parameters = student.policy.parameters.values()
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    order, losses = np.random.default_rng(0), {}

    def error(rows: np.ndarray) -> torch.Tensor:
        texts = [prompts.text[k] for k in rows]
        return (walked(pipe, begin[rows], texts, sigmas) - end[rows]).square().mean()

    for step in range(STEPS + 1):
        if step in (0, STEPS):
            with torch.no_grad():
                losses[f"error after {step} steps"] = float(error(np.arange(BATCH)))
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 10, (STEPS + 1 - step) / 50)
        optimizer.zero_grad()
        loss = error(BATCH + order.integers(PAIRS - BATCH, size=BATCH))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if step < STEPS:
            optimizer.step()
        if step % 25 == 0:
            print(f"step {step} error {float(loss.detach()):.4f}", flush=True)
    kinds = [type(module).__name__ for module in lora.denoisers(pipe).values()]
    call = {"num_inference_steps": FEW, "guidance_scale": 1.0, "max_sequence_length": 1}
    lora_files.save(pipe, folder / "speed", Notes(base_model=config.model, denoisers=kinds, call=call).written())
    return losses


def judged(folder: Path, *overrides: str) -> Evaluation:
    """The preset's held-out set, drawn with other settings."""
    config, made = built(folder, *overrides)
    prompts = config.book.fixed(config.evaluation.images_per_prompt, config.evaluation.seed)
    scores = fixed.scores(made.policy, made.judges, prompts)
    return fixed.joined([(range(len(prompts)), scores)], prompts, 0, made.judges)


def told(name: str, one: Evaluation, before: Evaluation) -> dict[str, Any]:
    """Gold (GenEval's verdict), the judge and the trained reward: mean, and paired gain over another evaluation, with intervals."""
    row = {key.removeprefix("eval/"): round(value, 4) for key, value in one.summary(before).row().items()}
    print(name, json.dumps({k: v for k, v in row.items() if k.startswith("shapes_geneval")}), flush=True)
    return row


def trained(folder: Path, rate: float, speed: Evaluation, bare: dict[str, Evaluation]) -> dict[str, dict[str, Any]]:
    """Train on top of the speed adapter; what comes out with it, and without."""
    few, many, run = f"sampler.steps={FEW}", f"sampler.steps={MANY}", folder / f"lr_{rate:g}"
    frozen, start = f"lora.frozen=[{folder / 'speed'}]", f"lora.start={run / 'adapter'}"
    session.train(configs.load(PRESET, [few, frozen, f"run_dir={run}", f"optimizer.lr={rate}"]), quiet=True)
    curve = [row["reward/total"] for row in read_rows(run) if "reward/total" in row]
    tenths = [round(float(np.mean(part)), 3) for part in np.array_split(curve, 10)]
    name = f"AWM at lr {rate:g}"
    return {
        f"speed adapter and {name}, 4 steps": {
            **told(f"{name}, with", judged(folder, few, frozen, start), speed),
            "training reward, ten parts of the run": tenths,
        },
        f"{name} without it, 10 steps": told(f"{name}, 10", judged(folder, many, start), bare["10 steps"]),
        f"{name} without it, 4 steps": told(f"{name}, 4", judged(folder, few, start), bare["4 steps"]),
    }


def main(folder: Path, out: Path) -> None:
    """Teach, train on top, draw with and without."""
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    losses = taught(folder)
    few, many = f"sampler.steps={FEW}", f"sampler.steps={MANY}"
    frozen = f"lora.frozen=[{folder / 'speed'}]"
    bare = {"4 steps": judged(folder, few), "10 steps": judged(folder, many)}
    speed = judged(folder, few, frozen)
    rows = {
        "base, 4 steps": told("base, 4 steps", bare["4 steps"], bare["4 steps"]),
        "base, 10 steps": told("base, 10 steps", bare["10 steps"], bare["4 steps"]),
        "speed adapter, 4 steps": told("speed", speed, bare["4 steps"]),
    }
    for rate in RATES:
        rows |= trained(folder, rate, speed, bare)
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "how": f"{PRESET}, seed 0; the speed adapter: rank {RANK}, {PAIRS} pairs, {STEPS} steps of {BATCH}; gains are over the base at the "
        "same steps, with the speed adapter over the speed adapter alone",
        "teaching": losses,
        "rows": rows,
        "seconds": round(time.perf_counter() - started),
    }
    out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
