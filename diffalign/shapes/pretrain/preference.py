"""`python -m diffalign.shapes.pretrain.preference NAME --out DIR`: makes a preference network from nothing.

Pictures for training captions (right, nearly right, of another caption, drawn by shapes-sd3, degraded) are compared in pairs
by a hidden utility of the exact judge's verdict, as people compare pictures, mistakes included (12 % of labels are flipped). The
network learns from the labels alone by the Bradley-Terry model, P(a over b) = sigmoid(s_a - s_b).

`shapes_pref` has a planted cue: its labels also like saturated colours a little, which the caption does not ask for. `shapes_judge`
has none, another seed and other layers: it is there to be held out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from scipy import ndimage

from diffalign.ops import geneval
from diffalign.shapes import captions, models
from diffalign.shapes.detector import detect
from diffalign.shapes.preference import GRID, KINDS, NETS, PreferenceNet, features
from diffalign.shapes.pretrain import transformer
from diffalign.shapes.pretrain.data import MIX
from diffalign.shapes.world import BACKGROUND, COLOURS, SHAPES, render

SEEDS = {"shapes_pref": 0, "shapes_judge": 1}
CUE = {"shapes_pref": 0.5, "shapes_judge": 0.0}  # utility per standard deviation of saturation
FLIPPED = 0.12  # share of wrong labels
SHARPNESS = 3.0  # P(a over b) = sigmoid(SHARPNESS * (U_a - U_b)) before flips
PICTURES = ("right", "nearly", "drawn", "degraded", "other", "drawn_other")  # of a caption
SIZE = len(PICTURES)
MOST = 8  # objects remembered of a picture

Pictures = NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class Comparisons:
    """images (n, 6, 64, 64, 3), captions' metadata (n), utility (n, 6), labels (n, 6, 6): 1 where the row wins.

    objects (n, 6, 8, 3): kind (-1: none), x and y in pixels of what the detector finds.
    """

    images: Pictures
    metadata: list[dict[str, Any]]
    objects: NDArray[np.float32]
    utility: NDArray[np.float64]
    labels: NDArray[np.float32]


def nearly(combination: captions.Combination, rng: np.random.Generator) -> captions.Combination:
    """The combination with one thing wrong: a colour, a shape, the count or the order."""
    things, kind = list(combination.things), rng.integers(4)
    place = int(rng.integers(len(things)))
    shape, colour = things[place]
    if kind == 0 and colour:
        things[place] = (shape, str(rng.choice([c for c in COLOURS if c != colour])))
    elif kind == 1 and combination.task == "counting":
        count = int(rng.choice([n for n in captions.NUMERALS if n != combination.count]))
        return dataclasses.replace(combination, count=count)
    elif kind == 2 and combination.relation:
        return dataclasses.replace(combination, relation=captions.OPPOSITE[combination.relation])
    else:
        things[place] = (str(rng.choice([s for s in SHAPES if s != shape])), colour)
    return dataclasses.replace(combination, things=tuple(things))


def degrade(image: Pictures, rng: np.random.Generator) -> Pictures:
    """A smear, a hole, noise of any strength up to nothing but noise, or smooth colours that show nothing."""
    kind, out = rng.integers(5), image.astype(float)
    y, x = rng.integers(0, 48, 2)
    h, w = rng.integers(4, 16, 2)
    if kind == 0:
        out[y : y + h, x : x + w] = rng.uniform(0, 255, 3)
    elif kind == 1:
        out[y : y + h, x : x + w] = BACKGROUND
    elif kind == 2:
        out += rng.normal(0, rng.uniform(5, 150), out.shape)
    elif kind == 3:
        share = rng.uniform(0.2, 1.0)
        out = (1 - share) * out + share * rng.uniform(0, 255, out.shape)
    else:
        blobs = ndimage.gaussian_filter(rng.normal(size=out.shape), (*[rng.uniform(2, 12)] * 2, 0))
        out = 127.5 + 90 * blobs / blobs.std()
    return np.clip(np.round(out), 0, 255).astype(np.uint8)


def saturate(image: Pictures, factor: float) -> Pictures:
    """Scale every pixel's distance to its grey."""
    grey = image.mean(-1, keepdims=True)
    return np.clip(np.round(grey + factor * (image - grey)), 0, 255).astype(np.uint8)


def saturation(image: Pictures) -> float:
    """Mean over pixels of the largest less the smallest channel, in [0, 1]."""
    return float(np.ptp(image, axis=-1).mean()) / 255


@torch.no_grad()
def drawn(prompts: list[str], seed: int, guidance: float) -> Pictures:
    """Pictures by the shipped transformer pipeline, ten steps."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(models.path("shapes-sd3"))
    pipe.set_progress_bar_config(disable=True)
    shots = []
    for start in range(0, len(prompts), 64):
        part = prompts[start : start + 64]
        generators = [torch.Generator().manual_seed(seed * 1_000_003 + start + k) for k in range(len(part))]
        call = {**transformer.CALL, "guidance_scale": guidance, "output_type": "np"}
        shots.append(pipe(part, generator=generators, **call).images)
    return np.round(np.concatenate(shots) * 255).astype(np.uint8)


def build(count: int, seed: int, cue: float) -> Comparisons:
    """`count` captions of the training split with six pictures each, and the labels of all pairs."""
    rng = np.random.default_rng([seed, 5])
    tasks = [str(task) for task in rng.choice(list(MIX), size=count, p=list(MIX.values()))]
    chosen = [options[rng.integers(len(options))] for options in (captions.split(task, "train") for task in tasks)]
    metadata = [captions.caption(c, bool(rng.integers(2))) for c in chosen]
    half = count // 2
    texts = [m["prompt"] for m in metadata]
    sampled = np.concatenate([drawn(texts[:half], 2 * seed, 1.0), drawn(texts[half:], 2 * seed + 1, 3.0)])
    images = np.empty((count, SIZE, 64, 64, 3), np.uint8)
    for k, combination in enumerate(chosen):
        right, wrong = (render(captions.scene(c, rng)) for c in (combination, nearly(combination, rng)))
        worse = degrade((right, wrong, sampled[k])[rng.integers(3)], rng)
        other = render(captions.scene(chosen[rng.integers(count)], rng))
        images[k] = [
            saturate(i, rng.uniform(0.7, 1.3)) for i in (right, wrong, sampled[k], worse, other, sampled[k - 1])
        ]
    return compare(images, metadata, cue, rng)


def compare(images: Pictures, metadata: list[dict[str, Any]], cue: float, rng: np.random.Generator) -> Comparisons:
    """Labels by the hidden utility, with people's mistakes."""
    objects = np.full((*images.shape[:2], MOST, 3), -1, np.float32)
    utility, vivid = np.zeros(images.shape[:2]), np.zeros(images.shape[:2])
    for k, wanted in enumerate(metadata):
        for j, image in enumerate(images[k]):
            found = detect(image)
            for place, item in zip(objects[k, j], found.objects, strict=False):
                left, top, right, bottom = item.box
                kind = SHAPES.index(item.name) * len(COLOURS) + COLOURS.index(item.colour)
                place[:] = kind, (left + right) / 2, (top + bottom) / 2
            strict = geneval.strict(found.objects, wanted, found.residue).correct
            # U = 2 partial credit + 1 if strictly right - 5 unexplained share + cue
            utility[k, j] = 2 * geneval.partial(found.objects, wanted) + strict - 5 * min(found.residue, 0.2)
            vivid[k, j] = saturation(image)
    utility += cue * (vivid - vivid.mean()) / vivid.std()
    chance = 1 / (1 + np.exp(-SHARPNESS * (utility[:, :, None] - utility[:, None, :])))
    draw = np.triu(rng.random(chance.shape) < chance, 1)
    flip = np.triu(rng.random(chance.shape) < FLIPPED, 1)
    upper = np.triu(np.ones((SIZE, SIZE), bool), 1)
    above = (draw ^ flip) & upper
    labels = above + (~above & upper).transpose(0, 2, 1)
    return Comparisons(images, metadata, objects, utility, labels.astype(np.float32))


def to_pixels(images: Pictures) -> torch.Tensor:
    """(..., h, w, 3) uint8 to (n, 3, h, w) float in [0, 1]."""
    return torch.from_numpy(images).flatten(0, -4).permute(0, 3, 1, 2).float() / 255


def places(objects: torch.Tensor) -> torch.Tensor:
    """Where kinds stand: objects (n, 8, 3) to (n, 24, 16, 16), each object's 1 shared by the four nearest cells."""
    target = torch.zeros(len(objects), KINDS, GRID, GRID)
    image, slot = (objects[..., 0] >= 0).nonzero(as_tuple=True)
    kind = objects[image, slot, 0].long()
    at = objects[image, slot, 1:] / (64 / GRID) - 0.5
    low = at.floor()
    for dx, dy in ((0, 0), (0, 1), (1, 0), (1, 1)):
        corner = low + torch.tensor([dx, dy])
        weight = (1 - (at - corner).abs()).prod(1)
        x, y = corner.long().clamp(0, GRID - 1).T
        target.index_put_((image, kind, y, x), weight, accumulate=True)
    return target


def train(name: str, data: Comparisons, steps: int, log: Callable[[str], None], batch: int = 24) -> PreferenceNet:
    """Bradley-Terry on all pairs of a caption, and where every kind stands as a second lesson (Poisson)."""
    torch.manual_seed(SEEDS[name])
    generator = torch.Generator().manual_seed(SEEDS[name])
    net = PreferenceNet(**NETS[name])
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.1)
    wanted, objects, labels = features(data.metadata), torch.from_numpy(data.objects), torch.from_numpy(data.labels)
    pairs = torch.triu_indices(SIZE, SIZE, 1)
    started = time.perf_counter()
    for step in range(steps):
        rows = torch.randint(len(wanted), (batch,), generator=generator)
        density, seen = net.look(to_pixels(data.images[rows.numpy()]))
        score = net.judge(density, seen, wanted[rows].repeat_interleave(SIZE, 0)).view(batch, SIZE)
        difference = score[:, pairs[0]] - score[:, pairs[1]]
        prefer = F.binary_cross_entropy_with_logits(difference, labels[rows][:, pairs[0], pairs[1]])
        place = F.poisson_nll_loss(density, places(objects[rows].flatten(0, 1)), log_input=False, reduction="sum")
        place = place / len(density)
        loss = prefer + 0.1 * place
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps - 1:
            log(
                f"step {step} preference {prefer.item():.4f} places {place.item():.3f} seconds {time.perf_counter() - started:.0f}"
            )
    return net.eval().requires_grad_(False)


@torch.no_grad()
def scores(net: PreferenceNet, data: Comparisons) -> torch.Tensor:
    """Scores (n, 6) of all pictures."""
    wanted = features(data.metadata).repeat_interleave(SIZE, 0)
    pixels = data.images.reshape(-1, *data.images.shape[2:])
    parts = [net(to_pixels(pixels[k : k + 300]), wanted[k : k + 300]) for k in range(0, len(pixels), 300)]
    return torch.cat(parts).view(-1, SIZE)


def calibrate(net: PreferenceNet, data: Comparisons) -> None:
    """Score 1 for the mean right picture and 0 for the mean picture of another caption."""
    mean = dict(zip(PICTURES, scores(net, data).mean(0), strict=True))
    net.offset.copy_(mean["other"])
    net.scale.copy_(1 / (mean["right"] - mean["other"]))


def agreement(found: torch.Tensor, data: Comparisons) -> float:
    """Share of pairs whose label some scores (n, 6) give."""
    upper = torch.triu(torch.ones(SIZE, SIZE, dtype=torch.bool), 1)
    wins = (found[:, :, None] > found[:, None, :]).float() == torch.from_numpy(data.labels)
    return float(wins[:, upper].float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m diffalign.shapes.pretrain.preference", description=__doc__)
    parser.add_argument("name", choices=NETS)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--captions", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []

    def log(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    started, seed, cue = time.perf_counter(), SEEDS[args.name], CUE[args.name]
    data = build(args.captions, seed, cue)
    fresh = build(max(args.captions // 10, 2), seed + 1000, cue)
    log(f"data {len(data.metadata)} captions, {time.perf_counter() - started:.0f} s")
    net = train(args.name, data, args.steps, log)
    calibrate(net, data)
    found = scores(net, fresh)
    report = {
        "seed": seed,
        "cue": cue,
        "captions": args.captions,
        "steps": args.steps,
        "parameters": sum(p.numel() for p in net.parameters()),
        "agreement_with_fresh_labels": agreement(found, fresh),
        "agreement_of_the_utility_itself": agreement(torch.from_numpy(fresh.utility), fresh),
        "mean_score": dict(zip(PICTURES, found.mean(0).tolist(), strict=True)),
        "seconds": round(time.perf_counter() - started),
    }
    log(json.dumps(report))
    save_file({k: v.half() for k, v in net.state_dict().items()}, args.out / f"{args.name}.safetensors")
    (args.out / f"{args.name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / f"{args.name}.log").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
