"""Judging models and adapters on suites of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from diffalign.cli.commands import app
from diffalign.evaluation.catalog import SUITES
from diffalign.runtime import launcher
from diffalign.runtime.options import A_CALL, Place


@app.command()
@click.argument("targets", nargs=-1, required=True, metavar="RUN|ADAPTER|MODEL...")
@click.option("--suite", required=True, metavar="NAME|FILE", help=f"{', '.join(SUITES)}, a file.")
@click.option(
    "--prompts", help="The copy of a published suite's prompts, or others for its judges: a set's name or a file."
)
@click.option(
    "--judges",
    "--reward",
    multiple=True,
    metavar="NAME,...",
    help="Rewards that judge, instead of the suite's; also several times.",
)
@click.option("--split", type=click.Choice(("train", "validation", "test")), default="test", show_default=True)
@click.option("-n", "samples", type=click.IntRange(1, 1000), help="Samples a prompt; else as the suite says, or 4.")
@A_CALL
@click.option("--batch", type=click.IntRange(1, 1024), default=16, show_default=True, help="Samples at a time.")
@click.option(
    "--drift/--no-drift",
    default=True,
    show_default=True,
    help="Also run adapters' calls without them, to measure how far predictions are from the base model's: twice the work.",
)
@click.option(
    "--export",
    type=click.Choice(("vbench",)),
    help="Also write videos as VBench's own tool wants them, PROMPT-INDEX.mp4.",
)
@click.option(
    "--fps", type=click.IntRange(1, 240), help="Frames per second of videos; else as trained, or the model's."
)
@click.option("--fresh", is_flag=True, help="Make again what is there.")
@click.option("--out", required=True, type=Place(file_okay=False, path_type=Path), help="Folder to write to.")
def evaluate(targets: tuple[str, ...], suite: str, judges: tuple[str, ...], out: Path, **asked: Any) -> None:
    """Judge models and adapters on a suite of prompts, all from the same noises, with intervals, grids and a page."""
    from diffalign.evaluation import suite as suites
    from diffalign.runtime.display import Display

    with Display(quiet=not launcher.leads()) as display:
        names = [name for text in judges for name in text.split(",")]
        suites.evaluate(targets, suite, out, judges=names, say=display.result, progress=display.doing, **asked)
