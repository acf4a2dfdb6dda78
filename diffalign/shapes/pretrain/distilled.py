"""shapes-turbo: shapes-sd3 taught to draw in four network calls. `python -m diffalign.shapes.pretrain.distilled --out DIR [--seed 0]`

The teacher walks without noise and without guidance, 20 steps down to its picture; the student, which begins as the teacher, learns to
say from every level where that walk ends: mean squared error of the clean latents. One half of a batch is the student's own walk of four
calls, with the gradient through all of them; the other half stands on the teacher's walk, at any of its levels. So the prediction is one
picture, and not the mean of all that could be, which is what tells a distilled network from a flow.

The scheduler's `shift_terminal` keeps the last call at 0.25, so that a plain call of four steps sees 1, 0.75, 0.5, 0.25.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from diffalign.processes import linear_sigmas
from diffalign.shapes import models
from diffalign.shapes.pretrain import data, judging, saving, text, training, transformer

TEACHER = "shapes-sd3"
FEW, MANY = 4, 20  # calls of the student, of the teacher
BATCH = 64  # half of it on either walk
PACE = 0.1  # of pretraining's learning rates
CALL = {"num_inference_steps": FEW, "max_sequence_length": 1}


@dataclass
class Student(transformer.Model):
    """The teacher's parts, of which the transformer alone is trained."""

    def modules(self) -> list[torch.nn.Module]:
        return [self.transformer]

    def loss(self, x0: torch.Tensor, ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Mean squared error of the clean latents on both walks; x0: the teacher's latents (n, 21, 4, 16, 16), noise first."""
        walks = x0.float()
        self.attention.count = 256 if torch.rand((), generator=generator) < 0.3 else 1
        half = len(walks) // 2
        with torch.no_grad():
            context, pooled = transformer.embed(self, ids)
        x, end = walks[:half, 0], walks[:half, -1]
        own = []
        for now, then in itertools.pairwise([*linear_sigmas(FEW), 0.0]):
            clean = self.clean(x, torch.full((half,), now), context[:half], pooled[:half])
            own.append((clean - end).square().mean())
            x = clean + then / now * (x - clean)
        rows = torch.arange(half, len(walks))
        levels = torch.randint(MANY, rows.shape, generator=generator)
        clean = self.clean(walks[rows, levels], 1 - levels / MANY, context[half:], pooled[half:])
        return torch.stack(own).mean() + (clean - walks[rows, -1]).square().mean()

    def clean(self, x: torch.Tensor, sigma: torch.Tensor, context: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        """The clean latents that the network predicts at noise levels (n)."""
        v = self.transformer(x, context, pooled, sigma * 1000, return_dict=False)[0]
        return x - sigma[:, None, None, None] * v


def student(pipe: StableDiffusion3Pipeline) -> Student:
    """A student that is its teacher."""
    first, second = (encoder.eval().requires_grad_(False) for encoder in (pipe.text_encoder, pipe.text_encoder_2))
    made = Student(pipe.tokenizer, first, second, pipe.transformer)
    pipe.transformer.set_attn_processor(made.attention)
    return made


@torch.no_grad()
def walks(teacher: Student, prompts: list[str], seed: int) -> torch.Tensor:
    """The teacher's latents from pure noise to its picture, (n, 21, 4, 16, 16); in half precision, its calls in bfloat16 for speed."""
    generator = torch.Generator().manual_seed(seed)
    ids = teacher.tokens(
        prompts, padding="max_length", max_length=text.LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
    parts = []
    for some in ids.split(BATCH):
        context, pooled = transformer.embed(teacher, some)
        x = torch.randn(len(some), 4, 16, 16, generator=generator)
        states = [x]
        for now, then in itertools.pairwise([*linear_sigmas(MANY), 0.0]):
            with torch.autocast("cpu", torch.bfloat16):
                clean = teacher.clean(x, torch.full((len(some),), now), context, pooled)
            x = clean + then / now * (x - clean)
            states.append(x)
        parts.append(torch.stack(states, 1).half())
    return torch.cat(parts)


def pipeline(made: Student, teacher: StableDiffusion3Pipeline) -> StableDiffusion3Pipeline:
    """An ordinary pipeline around a student, whose plain call of four steps has the levels it was taught at."""
    pipe = made.pipeline(teacher.vae)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, shift_terminal=1 / FEW)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def scores(pipe: Any, images: int, seed: int, log: Callable[[str], None]) -> tuple[dict[str, Any], Any]:
    """Verdicts on both splits, and those of the teacher at as many calls and at ten; the student's pictures of test captions."""
    teacher = StableDiffusion3Pipeline.from_pretrained(models.FOLDER / TEACHER)
    teacher.set_progress_bar_config(disable=True)
    found, shown = {}, None
    for name, drawn, steps, split in (
        ("train, guidance 1, 4 steps", pipe, FEW, "train"),
        ("test, guidance 1, 4 steps", pipe, FEW, "test"),
        ("teacher, test, guidance 1, 4 steps", teacher, FEW, "test"),
        ("teacher, test, guidance 1, 10 steps", teacher, 10, "test"),
    ):
        call = {**CALL, "num_inference_steps": steps, "sigmas": linear_sigmas(steps)}
        found[name], pictures = judging.pictures(drawn, call, split, 1.0, images, seed)
        shown = pictures if drawn is pipe else shown
        log(f"{name}: " + ", ".join(f"{k} {v['official']:.2f}" for k, v in found[name].items()))
    return found, shown


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m diffalign.shapes.pretrain.distilled", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the pipeline to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--walks", type=int, default=4096, help="of the teacher, each of another noise")
    parser.add_argument("--steps", type=int, default=800, help=f"of the student, batch {BATCH}")
    parser.add_argument("--images", type=int, default=96, help="evaluation samples per task")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    started = time.perf_counter()

    def log(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    teacher = StableDiffusion3Pipeline.from_pretrained(models.FOLDER / TEACHER)
    prompts = data.pictures(args.walks, args.seed).prompts
    taught = walks(student(teacher), prompts, args.seed)
    log(f"walks {len(taught)}, {len(set(prompts))} captions, {time.perf_counter() - started:.0f} s")
    so_far = args.out / "so_far.pt"  # the averaged weights, every 100 steps
    made = training.train(
        lambda: student(teacher),
        taught,
        prompts,
        args.steps,
        args.seed,
        log,
        batch=BATCH,
        dropout=0.0,
        pace=PACE,
        kept=lambda average: torch.save(average.transformer.state_dict(), so_far),
    )
    pipe = pipeline(made, teacher)
    report: dict[str, Any] = {"seed": args.seed, "walks": args.walks, "steps": args.steps}
    report["scores"], shown = scores(pipe, args.images, args.seed, log)
    so_far.unlink()
    report["seconds"] = round(time.perf_counter() - started)
    saving.save(args.out, pipe, report, shown, lines)


if __name__ == "__main__":
    main()
