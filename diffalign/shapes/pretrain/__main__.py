"""`python -m diffalign.shapes.pretrain NAME --out DIR [--seed 0]`: makes an embedded pipeline from nothing."""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import torch

from diffalign.shapes.pretrain import data, flux, judging, saving, training, transformer, unet, vae, wan

PICTURES = (data.pictures, vae.for_pictures, judging.pictures)
VIDEOS = (data.videos, vae.for_videos, judging.videos)
RECIPES = {
    "shapes-sd3": (transformer, *PICTURES),
    "shapes-sd": (unet, *PICTURES),
    "shapes-flux": (flux, *PICTURES),
    "shapes-wan": (wan, *VIDEOS),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m diffalign.shapes.pretrain", description=__doc__)
    parser.add_argument("pipeline", choices=RECIPES)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the pipeline to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=50_000, help="rendered training scenes or videos")
    parser.add_argument("--vae-steps", type=int, default=3000)
    parser.add_argument("--autoencoder", type=Path, help="pipeline folder whose autoencoder is taken instead")
    parser.add_argument("--steps", type=int, default=4500, help="denoiser steps, batch 64")
    parser.add_argument("--images", type=int, default=96, help="evaluation samples per task")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    architecture, build, coder_of, judge = RECIPES[args.pipeline]
    started = time.perf_counter()

    def log(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    torch.manual_seed(args.seed)
    scenes = build(args.scenes, args.seed)
    log(
        f"data {len(scenes.prompts)} scenes, {len(set(scenes.prompts))} captions, {time.perf_counter() - started:.0f} s"
    )
    coder = coder_of(args.autoencoder)
    if args.autoencoder is None:
        vae.train(coder, scenes.images, args.vae_steps, args.seed, log)
    latents = vae.normalise(coder, vae.encode(coder, scenes.images), architecture.SHIFTED)
    log(f"latents {time.perf_counter() - started:.0f} s")
    model = training.train(architecture.create, latents, scenes.prompts, args.steps, args.seed, log)
    pipe = model.pipeline(coder.module)
    pipe.set_progress_bar_config(disable=True)
    report: dict[str, Any] = {"seed": args.seed, "scenes": args.scenes, "steps": args.steps, "scores": {}}
    steps = architecture.CALL["num_inference_steps"]
    for guidance, split in itertools.product(architecture.GUIDANCE, ("train", "test")):
        scores, shown = judge(pipe, architecture.CALL, split, guidance, args.images, args.seed)
        report["scores"][f"{split}, guidance {guidance:g}, {steps} steps"] = scores
        log(f"{split} guidance {guidance:g}: " + ", ".join(f"{k} {v['official']:.2f}" for k, v in scores.items()))
    report["seconds"] = round(time.perf_counter() - started)
    saving.save(args.out, pipe, report, shown, lines)


if __name__ == "__main__":
    main()
