"""`diffalign sample`: pictures from a run, adapters or a model, through the plain diffusers pipeline."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffalign.errors import UserError
from diffalign.models.calls import films
from diffalign.prompts.files import read
from diffalign.report import pages
from diffalign.report.pictures import grid, small
from diffalign.runtime.extras import missing
from diffalign.runtime.files import make_folder
from diffalign.runtime.progress import Progress, silent
from diffalign.sampling.calling import drawer
from diffalign.sampling.sources import Source, call_of, check_negative, pipeline, resolve

PAGE = Path(__file__).parent / "page.html"
BATCH = 8  # pictures a call


def sample(
    source: Source | Path | str,
    prompts: Sequence[str],
    n: int = 4,
    seed: int = 0,
    out: Path | str = "samples",
    steps: int | None = None,
    guidance: float | None = None,
    negative: str | None = None,
    base: bool = False,
    fps: int = 16,
    progress: Progress = silent,
) -> list[Path]:
    """Write `n` pictures or videos a prompt, a grid and an index page; picture k of a prompt uses `manual_seed(seed + k)`.

    Args:
        source: a run, an adapter, a model, or what `resolve` made of them.
        negative: what guidance leads away from.
        base: also draw with the adapters off, from the same seeds, and show both.
        fps: frames per second of videos, which are mp4 files beside a picture of their middle frame.
        progress: told of every batch.

    Returns:
        The pictures with adapters, then those without, `grid.png` and `index.html`.

    Raises:
        UserError: if `out` cannot be written, an argument does not fit, or the model or an adapter does not load.
    """
    out = Path(out)
    source = source if isinstance(source, Source) else resolve(str(source))
    call = call_of(source, steps, guidance, negative)
    if base and not source.adapters:
        raise UserError(f"--base: {source.model} is sampled without an adapter, there is nothing to compare")
    make_folder(out, "--out")
    progress(f"loading {source.model}", 0, 0)
    pipe = pipeline(source)
    check_negative(pipe, call)
    if films(pipe) and (mend := missing("imageio")):
        raise UserError(f"sample: {type(pipe).__name__} makes videos, which need imageio; {mend}")
    draw, batch = drawer(pipe, replace(source, call=call)), 1 if films(pipe) else BATCH
    aligned = _draw(draw, batch, prompts, range(seed, seed + n), out, "", fps, progress)
    plain: list[Path] = []
    if base:
        pipe.disable_lora()
        plain = _draw(draw, batch, prompts, range(seed, seed + n), out, "_base", fps, progress)
    _grid(aligned, plain, n, out / "grid.png")
    _page(source, prompts, aligned, plain, n, call, out / "index.html")
    return [*aligned, *plain, out / "grid.png", out / "index.html"]


def captions(given: Sequence[str], file: str | None) -> list[str]:
    """The captions of a command line: given ones, then a file's.

    Raises:
        UserError: if there is none, or the file cannot be read.
    """
    texts = list(given)
    if file is not None:
        texts += [entry["prompt"] for entry in read(file, (), "test", "--prompts")]
    if not texts:
        raise UserError("sample: no caption; give --prompt TEXT or --prompts FILE")
    return texts


def label(path: Path) -> str:
    """What to say of a file that was written."""
    video = path.with_suffix(".mp4")
    return f"{video}, {path.name} is its middle frame" if video.is_file() else str(path)


def _draw(
    draw: Callable[[Sequence[str], Sequence[int]], Any],
    batch: int,
    prompts: Sequence[str],
    seeds: range,
    out: Path,
    ending: str,
    fps: int,
    progress: Progress,
) -> list[Path]:
    paths: list[Path] = []
    what = "sampling the base" if ending else "sampling"
    for number, prompt in enumerate(prompts):
        for start in range(0, len(seeds), batch):
            progress(what, len(paths), len(prompts) * len(seeds))
            some = seeds[start : start + batch]
            for s, shot in zip(some, draw([prompt] * len(some), some), strict=True):
                paths.append(_write(shot, out / f"{number:03d}_seed{s}{ending}.png", fps))
    return paths


def _write(shot: Any, path: Path, fps: int) -> Path:
    """A picture (H, W, 3), or a video (F, H, W, 3) as mp4 with its middle frame beside; values in [0, 1]."""
    import numpy as np
    from PIL import Image

    if not np.isfinite(np.asarray(shot)).all():
        raise UserError(
            f"sample: {path.stem} has numbers that are not finite; the call's arguments or an adapter are at fault"
        )
    shot = np.round(np.asarray(shot) * 255).astype(np.uint8)
    if shot.ndim == 4:
        write_video(shot, path.with_suffix(".mp4"), fps)
        shot = shot[len(shot) // 2]
    Image.fromarray(shot).save(path)
    return path


def write_video(frames: Any, path: Path, fps: int, quality: int = 5) -> None:
    """Frames (F, H, W, 3) uint8 as mp4; quality: 0 to 10, the best."""
    from imageio.v2 import mimwrite

    mimwrite(path, list(frames), fps=fps, macro_block_size=2, quality=quality)


def _grid(aligned: list[Path], plain: list[Path], n: int, path: Path) -> None:
    """Up to eight pictures a prompt in a row; where there are two kinds, the base's row above."""
    import numpy as np
    from PIL import Image

    columns = min(n, BATCH)
    rows: list[Path] = []
    for start in range(0, len(aligned), n):
        for kind in (plain, aligned):
            rows += kind[start : start + columns]
    grid(np.stack([np.asarray(Image.open(p)) for p in rows]), columns).save(path)


def _shown(picture: Path) -> str:
    """What the page shows: the video a picture is of, where there is one."""
    video = picture.with_suffix(".mp4")
    return video.name if video.exists() else picture.name


def _page(
    source: Source,
    prompts: Sequence[str],
    aligned: list[Path],
    plain: list[Path],
    n: int,
    call: dict[str, Any],
    path: Path,
) -> None:
    """An index page of all pictures, with what made them."""
    from PIL import Image

    groups = [
        {
            "prompt": prompt,
            "pairs": [
                {"seed": p.stem.split("seed")[1], "aligned": _shown(p), "base": _shown(plain[k]) if plain else None}
                for k, p in list(enumerate(aligned))[start : start + n]
            ],
        }
        for prompt, start in zip(prompts, range(0, len(aligned), n), strict=True)
    ]
    facts = {
        "model": source.model,
        "adapters": ", ".join(f"{a.folder} at {a.strength:g}" for a in source.adapters) or "none",
        "call": " ".join(f"{key}={shlex.quote(str(value))}" for key, value in call.items() if key != "sigmas"),
    }
    with Image.open(aligned[0]) as first:
        seen = small((first.height, first.width))
    path.write_text(pages.render(PAGE, groups=groups, facts=facts, base=bool(plain), small=seen), encoding="utf-8")
