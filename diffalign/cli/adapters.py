"""What is done with adapters besides drawing: export, merge, push."""

from __future__ import annotations

from pathlib import Path

import click

from diffalign.cli.commands import app, show
from diffalign.models.layer_names import FORMATS
from diffalign.runtime.options import Place

MORE = click.option(
    "--adapter",
    "more",
    multiple=True,
    metavar="PLACE[:STRENGTH]",
    help="A further adapter, added up with the first; several times.",
)
TARGET = click.argument("target", metavar="RUN|ADAPTER[:STRENGTH]")


@app.command()
@TARGET
@click.option("--out", type=Place(path_type=Path), required=True, help="A .safetensors file; a folder for peft.")
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    default="comfyui",
    show_default=True,
    help="Whose names: kohya's serve A1111 and Forge too.",
)
@click.option("--dtype", type=click.Choice(("float32", "bfloat16", "float16")), default="float32", show_default=True)
@click.option("--rank", type=click.IntRange(1, 4096), help="A lower rank, the nearest there is; says what is lost.")
@MORE
def export(target: str, out: Path, form: str, dtype: str, rank: int | None, more: tuple[str, ...]) -> None:
    """Write an adapter as a file that another tool reads."""
    from diffalign.models import exporting
    from diffalign.models.places import given

    adapters = [given(target, "export"), *map(given, more)]
    show(exporting.export(adapters, out, form, dtype, rank))


@app.command()
@click.argument("target", metavar="RUN|ADAPTER[:STRENGTH]|MODEL")
@click.option(
    "--out",
    type=Place(path_type=Path),
    required=True,
    help="A new folder for the pipeline; or a .safetensors file, where the base's weights came from one.",
)
@MORE
def merge(target: str, out: Path, more: tuple[str, ...]) -> None:
    """Write a base model with adapters in its weights, a run's, or a model's that are given with --adapter: a pipeline folder."""
    from diffalign.sampling import merged

    show(merged.write(target, more, out))


@app.command()
@TARGET
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="If the repository is made.")
@click.option(
    "--dry-run",
    "folder",
    type=Place(path_type=Path, file_okay=False),
    help="Write here what would be sent, and send nothing.",
)
def push(target: str, repository: str, private: bool, folder: Path | None) -> None:
    """Send an adapter to the Hugging Face hub, with a page that says what it is."""
    from diffalign.runs import hub

    show(hub.push(target, repository, private, folder))
