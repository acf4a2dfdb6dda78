"""What several commands ask for: options, and kinds of values that they take."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import click

from diffalign.runtime.files import home
from diffalign.runtime.precision import PRECISIONS, QUANTIZE


class Number(click.FloatRange):
    """A range of numbers; click's own lets NaN through."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        return number if math.isfinite(number) else self.fail(f"{value!r} is not a finite number.", param, ctx)


class Place(click.Path):
    """A path, with `~` as the user's home also where the shell leaves it alone, as in --out=~/pictures."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(home(value) if isinstance(value, str) else value, param, ctx)


def options(*given: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several decorators as one."""

    def decorate(command: Any) -> Any:
        for decorator in reversed(given):
            command = decorator(command)
        return command

    return decorate


VRAM = click.option(
    "--vram",
    type=Number(1, 10_000),
    metavar="GiB",
    help="Use memory in the cheapest way that fits a card of so many GiB.",
)
A_CALL = options(
    click.option("--seed", type=click.IntRange(0, 2**62), default=0, show_default=True),
    click.option("--steps", type=click.IntRange(1, 1000), help="Sampling steps [default: as trained]."),
    click.option("--guidance", type=Number(0, 1000), help="Guidance scale [default: as trained]."),
    click.option("--set", "arguments", multiple=True, metavar="KEY=VALUE", help="A further argument of the call."),
    click.option(
        "--precision", "--dtype", type=click.Choice(tuple(PRECISIONS)), help="Of the model [default: as trained]."
    ),
    click.option("--quantize", type=click.Choice(QUANTIZE), help="What the denoiser is held in [default: as trained]."),
)
