"""`python -m diffalign.shapes.pretrain shapes-sd3|shapes-sd|shapes-flux --out DIR [--seed 0]`: makes an embedded pipeline from nothing."""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny
from PIL import Image

from diffalign.ops import geneval
from diffalign.shapes import captions
from diffalign.shapes.detector import detect
from diffalign.shapes.pretrain import data, flux, training, transformer, unet, vae

ARCHITECTURES = {"shapes-sd3": transformer, "shapes-sd": unet, "shapes-flux": flux}


def autoencoder_of(folder: Path) -> AutoencoderTiny:
    """The autoencoder of a pipeline made before; both pipelines draw the same pictures."""
    made = AutoencoderTiny.from_pretrained(folder, subfolder="vae")
    return made.eval().requires_grad_(False)


@torch.no_grad()
def evaluate(
    pipe: Any, call: dict[str, Any], split: str, guidance: float, per_task: int, seed: int
) -> tuple[dict[str, dict[str, float]], list[np.ndarray]]:
    """Official, strict and partial score per task, and the pictures, on the captions of a split."""
    scores: dict[str, dict[str, float]] = {}
    pictures: list[np.ndarray] = []
    rng = np.random.default_rng([seed, 3])
    for task in captions.TASKS:
        options = captions.captions(task, split)
        chosen = [options[k] for k in rng.permutation(np.arange(per_task) % len(options))]
        generators = [torch.Generator().manual_seed(seed * 100_003 + k) for k in range(per_task)]
        images = pipe(
            [m["prompt"] for m in chosen],
            **call,
            guidance_scale=guidance,
            generator=generators,
            output_type="np",
        ).images
        shots = [np.round(image * 255).astype(np.uint8) for image in images]
        pictures += shots
        found = [detect(image) for image in shots]
        pairs = list(zip(found, chosen, strict=True))
        scores[task] = {
            "official": float(np.mean([geneval.official(f.objects, m).correct for f, m in pairs])),
            "strict": float(np.mean([geneval.strict(f.objects, m, f.residue).correct for f, m in pairs])),
            "partial": float(np.mean([geneval.partial(f.objects, m) for f, m in pairs])),
        }
    keys = ("official", "strict", "partial")
    scores["mean"] = {key: float(np.mean([row[key] for row in scores.values()])) for key in keys}
    return scores, pictures


def tidy(folder: Path) -> None:
    """Make transformers load the half-precision files as float32, as diffusers does: a plain load is then of one dtype. And leave
    out where parts came from."""
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        float32 = {"dtype": "float32"} if path.parent.name.startswith("text_encoder") else {}
        path.write_text(json.dumps({**config, **float32}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m diffalign.shapes.pretrain", description=__doc__)
    parser.add_argument("pipeline", choices=ARCHITECTURES)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the pipeline to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=50_000, help="rendered training scenes")
    parser.add_argument("--vae-steps", type=int, default=3000)
    parser.add_argument("--autoencoder", type=Path, help="pipeline folder whose autoencoder is taken instead")
    parser.add_argument("--steps", type=int, default=4500, help="denoiser steps, batch 64")
    parser.add_argument("--images", type=int, default=96, help="evaluation images per task")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    architecture = ARCHITECTURES[args.pipeline]
    started = time.perf_counter()

    def log(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    torch.manual_seed(args.seed)
    scenes = data.build(args.scenes, args.seed)
    log(
        f"data {len(scenes.prompts)} scenes, {len(set(scenes.prompts))} captions, {time.perf_counter() - started:.0f} s"
    )
    made = autoencoder_of(args.autoencoder) if args.autoencoder else None
    autoencoder = made or vae.train(scenes.images, args.vae_steps, args.seed, log)
    latents = vae.encode(autoencoder, scenes.images)
    vae.normalise(autoencoder, latents[:2000], architecture.SHIFTED)
    latents = (latents - autoencoder.config.shift_factor) * autoencoder.config.scaling_factor
    log(f"latents {time.perf_counter() - started:.0f} s")
    model = training.train(architecture.create, latents, scenes.prompts, args.steps, args.seed, log)
    pipe = model.pipeline(autoencoder)
    pipe.set_progress_bar_config(disable=True)
    report: dict[str, Any] = {"seed": args.seed, "scenes": args.scenes, "steps": args.steps, "scores": {}}
    steps = architecture.CALL["num_inference_steps"]
    for guidance, split in itertools.product(architecture.GUIDANCE, ("train", "test")):
        scores, pictures = evaluate(pipe, architecture.CALL, split, guidance, args.images, seed=args.seed)
        report["scores"][f"{split}, guidance {guidance:g}, {steps} steps"] = scores
        log(f"{split} guidance {guidance:g}: " + ", ".join(f"{k} {v['official']:.2f}" for k, v in scores.items()))
    shown = min(12, args.images)
    rows = [np.concatenate(pictures[k * args.images : k * args.images + shown], 1) for k in range(len(captions.TASKS))]
    Image.fromarray(np.concatenate(rows)).save(args.out / "samples.png")
    pipe.to(torch.float16).save_pretrained(args.out)
    tidy(args.out)
    report["seconds"] = round(time.perf_counter() - started)
    (args.out / "scores.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "pretrain.log").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
