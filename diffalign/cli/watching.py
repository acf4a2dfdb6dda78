"""The command that shows runs as they go on."""

from __future__ import annotations

from pathlib import Path

import click

from diffalign.cli.commands import app
from diffalign.runtime.http import TOKEN
from diffalign.runtime.options import Place


@app.command()
@click.argument("folder", metavar="RUN|FOLDER", type=Place(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=8091, show_default=True, help="0: any free one.")
@click.option("--token", envvar=TOKEN, show_envvar=True, help="What browsers must give as a password.")
def watch(folder: Path, host: str, port: int, token: str | None) -> None:
    """Serve the page of a run, or a list of the runs under a folder, as they go on; reads only, here only unless --host says otherwise."""
    from diffalign.runs.watching import server

    server.serve(folder, host, port, token)
