"""What rewards written for other trainers return, read as one number a sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign.errors import Fault, shown
from diffalign.rewards.base import numbers


def read(output: Any, count: int, part: str = "") -> Any:
    """The scores (count,) in what was returned: a tensor, with its gradient, or an array, NaN where there is none.

    Taken are one number a sample as (count,) or (count, 1), the same with anything after it in a tuple, `.rewards`, and, where `part` says
    which, a dict, a list of dicts, columns (count, K) or several things.

    Raises:
        Fault: for anything else; it says what was returned and what is allowed.
    """
    output = getattr(output, "rewards", output)
    if isinstance(output, tuple) and not _is_scores(output, count):
        output, part = _of_several(output, part)
    if isinstance(output, dict):
        output, part = _of_dict(output, part), ""
    elif isinstance(output, list) and len(output) == count and all(isinstance(each, dict) for each in output):
        output, part = [_of_dict(each, part) for each in output], ""
    values = _stacked(output, count)
    shape = tuple(values.shape)
    if shape == () and count == 1:
        values, shape = values.reshape(1), (1,)
    if len(shape) == 2 and shape[0] == count and shape[1] > 0:
        values, part = _column(values, part), ""
    elif shape != (count,):
        what = "one number" if shape == () else f"numbers of shape {shape}"
        raise Fault(f"returned {what} for {count} pictures, {_allowed(count)}")
    if part:
        raise Fault(f"returned one number a picture, which has no part {part!r}; allowed is the name without #{part}")
    return values


def _allowed(count: int) -> str:
    return f"allowed is one number a picture: a tensor, an array or a list of {count}"


def _is_scores(output: tuple[Any, ...], count: int) -> bool:
    """Whether a tuple is the scores themselves."""
    return len(output) == count and all(each is None or np.ndim(_plain(each)) == 0 for each in output)


def _plain(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value if np.isscalar(value) else [value]


def _of_several(output: tuple[Any, ...], part: str) -> tuple[Any, str]:
    """One of several things, and what is left to be looked for in it: of scores and what is said of them the scores."""
    if len(output) == 2 and (not part.isdigit() or isinstance(output[1], dict) or output[1] is None):
        return output[0], part
    if part.isdigit() and int(part) < len(output):
        return output[int(part)], ""
    names = f"#0 to #{len(output) - 1}" if output else "a list of numbers"
    raise Fault(f"returned {len(output)} things; allowed after the reward's name is {names}")


def _of_dict(output: dict[Any, Any], part: str) -> Any:
    if part in output:
        return output[part]
    names = ", ".join(f"#{key}" for key in output) or "none, since it is empty"
    raise Fault(f"returned a dict{f' without {part!r}' if part else ''}; allowed after the reward's name is {names}")


def _stacked(output: Any, count: int) -> Any:
    """A tensor, or an array of numbers."""
    if isinstance(output, Tensor):
        return output
    tensors = isinstance(output, (list, tuple)) and bool(output) and all(isinstance(each, Tensor) for each in output)
    if tensors and len({tuple(each.shape) for each in output}) == 1:
        return torch.stack(tuple(output))
    try:
        values = np.asarray(output)
        numbers(values.reshape(-1), values.size)  # what is no number is refused there
    except ValueError as error:
        raise Fault(f"returned {shown(output)}, {_allowed(count)}") from error
    return values.astype(float)


def _column(values: Any, part: str) -> Any:
    """A column (count,) of (count, K)."""
    width = values.shape[1]
    if width == 1 and part in ("", "0"):
        return values[:, 0]
    if part.isdigit() and int(part) < width:
        return values[:, int(part)]
    raise Fault(
        f"returned {values.shape[0]} x {width} numbers, allowed is one a picture, or #0 to #{width - 1} after the reward's name"
    )
