"""Kinds of values that the command line's options take."""

from __future__ import annotations

import math
from typing import Any

import click

from diffalign.runtime.files import home


class Number(click.FloatRange):
    """A range of numbers; click's own lets NaN through."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        return number if math.isfinite(number) else self.fail(f"{value!r} is not a finite number.", param, ctx)


class Place(click.Path):
    """A path, with `~` as the user's home also where the shell leaves it alone, as in --out=~/pictures."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(home(value) if isinstance(value, str) else value, param, ctx)
