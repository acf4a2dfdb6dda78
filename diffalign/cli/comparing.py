"""Commands that hold rules against each other: what their gradients are worth, and what they learn at equal budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from diffalign.cli.commands import app, show
from diffalign.runtime.options import Place

JOBS = click.option("--jobs", type=click.IntRange(1, 1000), default=None, help="Units at a time [default: 1].")
ALLOW = click.option("--allow", multiple=True, metavar="KEY", help="A key that methods may differ in; several times.")
BUDGET = click.option("--budget", help="Of every unit: updates=N, rows=N, reward_calls=N or seconds=N.")


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
@BUDGET
@click.option("--every", type=click.IntRange(0, 10**6), default=None, help="Updates between evaluations, for curves.")
@JOBS
@ALLOW
@click.option("--target", metavar="JUDGE=SCORE", help="What to reach [default: what the first method does].")
@click.option("--ray", metavar="auto|HOST:PORT", help="Train on a Ray cluster whose nodes share the folder of --out.")
@click.option("--print-commands", is_flag=True, help="Print a command a unit instead, to be run elsewhere.")
@click.option("--report", is_flag=True, help="Train nothing: tables and page from what is there.")
def compare(
    words: tuple[str, ...],
    out: Path,
    jobs: int | None,
    ray: str | None,
    print_commands: bool,
    report: bool,
    **asked: Any,
) -> None:
    """Train methods at an equal budget, several seeds of each, and say which differences are resolved.

    A method is CONFIG, with any of its keys changed by @KEY=VALUE: flow_grpo/shapes-sd3@optimizer.lr=1e-4. KEY=VALUE changes all. The same
    command goes on; methods and seeds may join.
    """
    from diffalign import comparing

    comparison = comparing.opened(words, out, **asked)
    if print_commands:
        show(unit.line() for unit in comparison.units if not unit.finished)
        return
    failed = {} if report else comparing.trained(comparison, jobs, lambda line: click.echo(line, err=True), ray)
    show(comparing.reported(comparison, failed))
    comparing.complete(comparison, failed)


@app.command()
@click.argument("words", nargs=-1, metavar="[CONFIG[@KEY=VALUE]...]... [KEY=VALUE]...")
@click.option("--out", required=True, type=Place(file_okay=False, path_type=Path), help="Folder; it may hold the same.")
@click.option("--trials", type=click.IntRange(1, 10_000), default=None, help="Of each CONFIG; the first is as it is.")
@click.option("--on", metavar="validation|FILE", help="Prompts that trials are judged on [default: validation].")
@BUDGET
@click.option("--judge", metavar="NAME", help="Whose gain is to be high [default: the training reward's].")
@click.option(
    "--seed", type=click.IntRange(0, 2**31), default=None, help="Of training and of what is tried [default: 0]."
)
@JOBS
@ALLOW
def tune(words: tuple[str, ...], out: Path, jobs: int | None, **asked: Any) -> None:
    """Choose each CONFIG's learning rate and its rule's knobs by as many trials of the same small budget, and write them as a config.

    What is tried stands beside each setting's definition, as a range around CONFIG's own value. The same command goes on.
    """
    from diffalign.comparing import tuning

    opened = tuning.opened(words, out, **asked)
    killed = tuning.tried(opened, jobs or 1, lambda line: click.echo(line, err=True))
    show(tuning.reported(opened))
    tuning.complete(opened, killed)
