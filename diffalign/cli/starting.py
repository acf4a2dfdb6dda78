"""Where one begins: a demonstration, a config of one's own, what its keys mean."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from diffalign import config as configs
from diffalign.cli.commands import app, show, train
from diffalign.cli.completion import A_CONFIG
from diffalign.runtime.files import write_text
from diffalign.runtime.options import VRAM, Place


@app.command()
@click.argument("place", metavar="FILE", type=Place(path_type=Path, dir_okay=False), default="mine.yaml")
@click.option("--model", help="Hub id, folder, or an embedded pipeline [default: shapes-sd3].")
@click.option("--rule", help="How it learns [default: of the preset that is nearest].")
@click.option("--reward", "rewards", multiple=True, help="What goes up; several times.")
@click.option("--prompts", help="A file of prompts, or a set's name.")
@VRAM
def init(place: Path, model: str | None, **asked: Any) -> None:
    """Write a config of your own, with a line on each choice: it trains as it stands."""
    from diffalign.planning import starter

    if model is None and sys.stdin.isatty():
        model = click.prompt("Model: hub id, folder, or an embedded pipeline", default=starter.EMBEDDED)
        if not asked["prompts"]:
            asked["prompts"] = (
                click.prompt("Prompts: a file, or empty for the preset's", default="", show_default=False) or None
            )
    show(starter.write(place, model or starter.EMBEDDED, **asked))


@app.command()
@click.pass_context
def demo(context: click.Context) -> None:
    """Train the embedded pipeline to count: minutes on a laptop, no download."""
    context.invoke(
        train, config="flow_grpo/shapes-sd3", overrides=(), fresh=False, change=False, quiet=False, vram=None
    )


@app.command()
@click.option(
    "--out",
    type=Place(path_type=Path, dir_okay=False),
    help="Write it there instead; a config then names it in its first line.",
)
def schema(out: Path | None) -> None:
    """Print the JSON schema of a config, for editors."""
    from diffalign.config import json_schema

    if out is None:
        show([json_schema.text().rstrip()])
        return
    write_text(out, json_schema.text())
    show(
        [f"{out}: name it in a config's first line, its path seen from the config", json_schema.line(out.name).rstrip()]
    )


@app.command("config")
@A_CONFIG
def show_config(config: str, overrides: tuple[str, ...]) -> None:
    """Print every key of CONFIG: its value, what it is, what is allowed, its default where that is another."""
    show(configs.explained(configs.load(config, overrides)))
