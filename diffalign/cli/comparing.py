"""Commands that hold rules against each other: what their gradients are worth, and what they learn at equal budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from diffalign.cli.commands import app, show
from diffalign.runtime.options import Place


@app.command()
@click.argument("words", nargs=-1, required=True, metavar="CONFIG[@KEY=VALUE]... [KEY=VALUE]...")
@click.option("--out", required=True, type=Place(file_okay=False, path_type=Path), help="Table, JSON and figure.")
@click.option("--batches", type=click.IntRange(4, 100_000), default=32, show_default=True, help="Gradients a rule.")
@click.option("--chain", is_flag=True, help="On the Gaussian chain, with the first CONFIG's sampler.")
def gradients(words: tuple[str, ...], out: Path, batches: int, chain: bool) -> None:
    """Bias, variance and cost of rules' gradients on one batch, against full backpropagation.

    Model, sampler, rewards and prompts are the first CONFIG's, changed by KEY=VALUE; of the others only the rule counts.
    CONFIG@KEY=VALUE changes a setting of a rule: rlr/shapes-sd3@depth=1@span=2.
    """
    from diffalign.comparing.gradients import instrument

    measured = instrument.run(instrument.specifications(words), out, batches, chain, click.echo)
    show(instrument.table(measured, out))


@app.command()
@click.argument("words", nargs=-1, metavar="[CONFIG[@KEY=VALUE]...]... [KEY=VALUE]...")
@click.option("--out", required=True, type=Place(file_okay=False, path_type=Path), help="Folder; it may hold the same.")
@click.option("--seeds", help="Of training, such as 0,1,2.")
@click.option("--budget", help="Of every unit: updates=N, rows=N, reward_calls=N or seconds=N.")
@click.option("--every", type=click.IntRange(0, 10**6), default=None, help="Updates between evaluations, for curves.")
@click.option("--jobs", type=click.IntRange(1, 1000), default=1, show_default=True, help="Units at a time.")
@click.option("--allow", multiple=True, metavar="KEY", help="A key that methods may differ in; several times.")
@click.option("--target", metavar="JUDGE=SCORE", help="What to reach [default: what the first method does].")
@click.option("--print-commands", is_flag=True, help="Print a command a unit instead, to be run elsewhere.")
@click.option("--report", is_flag=True, help="Train nothing: tables and page from what is there.")
def compare(words: tuple[str, ...], out: Path, jobs: int, print_commands: bool, report: bool, **asked: Any) -> None:
    """Train methods at an equal budget, several seeds of each, and say which differences are resolved.

    A method is CONFIG, with any of its keys changed by @KEY=VALUE: flow_grpo/shapes-sd3@optimizer.lr=1e-4. KEY=VALUE changes all. The same
    command goes on; methods and seeds may join.
    """
    from diffalign import comparing

    comparison = comparing.opened(words, out, **asked)
    if print_commands:
        show(unit.line() for unit in comparison.units if not unit.finished)
        return
    failed = {} if report else comparing.trained(comparison, jobs, lambda line: click.echo(line, err=True))
    show(comparing.reported(comparison, failed))
    comparing.complete(comparison, failed)
