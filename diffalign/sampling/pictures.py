"""`diffalign sample`: pictures from a run, adapters or a model, through the plain diffusers pipeline."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffalign.errors import UserError
from diffalign.models.calls import films
from diffalign.prompts.files import Entry, read
from diffalign.report import pages
from diffalign.report.pictures import grid, small
from diffalign.runtime.extras import missing
from diffalign.runtime.files import make_folder
from diffalign.runtime.progress import Progress, silent
from diffalign.sampling.calling import drawer
from diffalign.sampling.shots import FPS, Files, Judgement, Shot
from diffalign.sampling.sources import GUIDED, Source, call_of, check_negative, pipeline, resolve

PAGE = Path(__file__).parent / "page.html"
BATCH = 8  # pictures a call


def sample(
    source: Source | Path | str,
    prompts: Sequence[str | Entry],
    n: int = 4,
    seed: int = 0,
    out: Path | str = "samples",
    steps: int | None = None,
    guidance: float | None = None,
    negative: str | None = None,
    base: bool = False,
    fps: float | None = None,
    progress: Progress = silent,
    best_of: int | None = None,
    judge: Judgement | None = None,
) -> list[Path]:
    """Write `n` pictures or videos a prompt, a grid and an index page; picture k of a prompt uses `manual_seed(seed + k)`.

    Args:
        source: a run, an adapter, a model, or what `resolve` made of them.
        prompts: captions, or entries of a prompt file with what its rewards read.
        negative: what guidance leads away from.
        base: also draw with the adapters off, from the same seeds, and show both.
        fps: frames per second of videos, which are mp4 files beside a picture of their middle frame; None: what the source says, or 16.
        progress: told of every batch.
        best_of, judge: draw so many and keep the `n` that the judge likes best, best first; `diffalign.rewards.picking.judge` makes one.

    Returns:
        The pictures with adapters, then those without, `grid.png` and `index.html`.

    Raises:
        UserError: if `out` cannot be written, an argument does not fit, or the model or an adapter does not load.
    """
    from diffalign.sampling.mixing import mixed

    out = Path(out)
    source = source if isinstance(source, Source) else resolve(str(source))
    call = call_of(source, steps, guidance, negative)
    entries = [{"prompt": given} if isinstance(given, str) else given for given in prompts]
    check_best(n, best_of, judge is not None)
    _check(source)
    if base and not source.adapters:
        raise UserError(f"--base: {source.model} is sampled without an adapter, there is nothing to compare")
    make_folder(out, "--out")
    progress(f"loading {source.model}", 0, 0)
    pipe = pipeline(source)
    check_negative(pipe, call)
    if films(pipe) and (mend := missing("imageio")):
        raise UserError(f"sample: {type(pipe).__name__} makes videos, which need imageio; {mend}")
    draw, batch = drawer(pipe, replace(source, call=call)), 1 if films(pipe) else BATCH
    files = Files(out, fps or source.fps or FPS, batch, progress)
    pool = [range(seed, seed + (best_of or n))] * len(entries)
    aligned = files.draw(mixed(pipe, source, draw), entries, pool, judge=judge, keep=n)
    plain: list[Shot] = []
    if base:
        pipe.disable_lora()
        kept = [[shot.seed for shot in aligned[start : start + n]] for start in range(0, len(aligned), n)]
        plain = files.draw(draw, entries, kept, "_base")
    _grid([shot.path for shot in aligned], [shot.path for shot in plain], n, out / "grid.png")
    _page(source, entries, aligned, plain, n, call, out / "index.html")
    return [*(shot.path for shot in (*aligned, *plain)), out / "grid.png", out / "index.html"]


def check_best(n: int, best_of: int | None, judged: bool) -> None:
    """Refuse to keep the best without a judge, or of too few.

    Raises:
        UserError: for that.
    """
    if (best_of is None) == judged:
        raise UserError("--best-of and --by: got one of them; allowed are both, such as --best-of 16 --by pickscore")
    if best_of is not None and best_of < n:
        raise UserError(f"--best-of: got {best_of}, {n} pictures are kept of a caption; allowed is {n} and more")


def _check(source: Source) -> None:
    """Refuse options that do not go together."""
    if source.mix == "predictions" and not source.adapters:
        raise UserError(f"--mix predictions: {source.model} is sampled without an adapter, there is nothing to mix")
    if source.negative is not None and source.call.get(GUIDED) is not None:
        raise UserError(
            f"--negative-adapter: guidance acts on the steps {source.call[GUIDED]} only; allowed with --set {GUIDED}=null"
        )


def captions(given: Sequence[str], file: str | None) -> list[Entry]:
    """The captions of a command line: given ones, then a file's, with what it says of them.

    Raises:
        UserError: if there is none, or the file cannot be read.
    """
    entries: list[Entry] = [{"prompt": text} for text in given]
    if file is not None:
        entries += read(file, (), "test", "--prompts")
    if not entries:
        raise UserError("sample: no caption; give --prompt TEXT or --prompts FILE")
    return entries


def label(path: Path) -> str:
    """What to say of a file that was written."""
    video = path.with_suffix(".mp4")
    return f"{video}, {path.name} is its middle frame" if video.is_file() else str(path)


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
    entries: Sequence[Entry],
    aligned: list[Shot],
    plain: list[Shot],
    n: int,
    call: dict[str, Any],
    path: Path,
) -> None:
    """An index page of all pictures, with what made them."""
    from PIL import Image

    groups = [
        {
            "prompt": entry["prompt"],
            "pairs": [
                {
                    "seed": shot.seed if shot.score is None else f"{shot.seed}, {shot.score:.4g}",
                    "aligned": _shown(shot.path),
                    "base": _shown(plain[k].path) if plain else None,
                }
                for k, shot in list(enumerate(aligned))[start : start + n]
            ],
        }
        for entry, start in zip(entries, range(0, len(aligned), n), strict=True)
    ]
    facts = {
        "model": source.model,
        "adapters": source.told,
        "call": " ".join(f"{key}={shlex.quote(str(value))}" for key, value in call.items() if key != "sigmas"),
    }
    with Image.open(aligned[0].path) as first:
        seen = small((first.height, first.width))
    path.write_text(pages.render(PAGE, groups=groups, facts=facts, base=bool(plain), small=seen), encoding="utf-8")
