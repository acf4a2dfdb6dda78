"""What a reward is, and what pictures it may expect. Needs torch."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffalign.errors import Fault, shown
from diffalign.types import Floats, Integers, Media, Prompts, rows_by_group


class Reward(ABC):
    """One number a sample; NaN where there is none, never a stand-in.

    background: whether it may score in a thread of its own while sampling goes on; foreign: whether it is a user's code, of which nothing
    is known; files: the user's, which its scores depend on; recognised: how a user's is called, as its signature tells; probed: whether
    that is tried before a run begins; clips: whether it is shown whole videos; keeps_gradient: whether its
    pictures are tensors that can have one; grouped: whether it compares the samples of a group, which has one of `sizes`.
    """

    background: bool = False
    foreign: bool = False
    files: tuple[Path, ...] = ()
    recognised: str = ""
    probed: bool = False
    clips: bool = True
    keeps_gradient: bool = True
    grouped: bool = False
    sizes: tuple[int, ...] = ()

    @property
    def said(self) -> str:
        """Why it last gave no score, as far as it knows."""
        return ""

    @abstractmethod
    def __call__(self, media: Media, prompts: Prompts) -> Tensor | Sequence[float]:
        """Scores (N,) of media; with a gradient to the pixels if its entry promises one."""

    def greet(self, say: Callable[[str], None] = print) -> None:
        """Find out before anything is begun whether it will answer; `say` hears what is waited for.

        Raises:
            UserError: if an address is wrong.
            Fault: if nobody answers there.
        """

    def checkpoint(self) -> None:
        """From now on keep only the inputs of its layers for the gradient."""

    def problems(self) -> list[str]:
        """What looks wrong with its weights."""
        return []

    def groups(self, prompts: Prompts) -> list[Integers]:
        """Rows of the samples of each group, for a reward that compares them.

        Raises:
            Fault: if one has another size than the whole ones have.
        """
        found = rows_by_group(prompts.group)
        for rows in found:
            if len(rows) not in self.sizes:
                sizes = " or ".join(map(str, self.sizes)) or "whole ones, which samples have in training and suites"
                raise Fault(f"compares the samples of a group and got one of {len(rows)}; allowed is {sizes}")
        return found

    def networks(self) -> list[torch.nn.Module]:
        """Its networks, which may be moved between uses: each call puts them where the pictures are."""
        return []

    def rest(self) -> None:
        """Leave the device until it is asked again."""
        for network in self.networks():
            network.to("cpu")


class Judge(ABC):
    """A network that gives a sample several numbers, each of which is a reward."""

    columns: tuple[str, ...] = ()

    @abstractmethod
    def __call__(self, media: Media, prompts: Prompts) -> Tensor:
        """Numbers (N, K) of media, one for each of `columns`."""

    @abstractmethod
    def networks(self) -> list[torch.nn.Module]:
        """Its networks, see `Reward`."""

    @abstractmethod
    def checkpoint(self) -> None:
        """See `Reward`; asked again it changes nothing."""


class Column(Reward):
    """One of a judge's numbers as a reward; those of one judge are answered together."""

    def __init__(self, judge: Judge, column: str) -> None:
        self.judge, self._number = judge, judge.columns.index(column)

    def __call__(self, media: Media, prompts: Prompts) -> Tensor:
        return self.of(self.judge(media, prompts))

    def of(self, answer: Tensor) -> Tensor:
        """Scores (N,) from the judge's numbers (N, K)."""
        return answer[:, self._number]

    def networks(self) -> list[torch.nn.Module]:
        return self.judge.networks()

    def checkpoint(self) -> None:
        self.judge.checkpoint()


class Wrapped(Reward):
    """A function, or an object of a class of its own, as a reward."""

    foreign = True

    def __init__(self, function: Callable[..., Any], background: bool = False) -> None:
        self.function = function
        self.background = background or getattr(function, "background", False)

    def __call__(self, media: Media, prompts: Prompts) -> Any:
        return self.function(media, prompts)

    @property
    def said(self) -> str:
        return getattr(self.function, "said", "")

    def greet(self, say: Callable[[str], None] = print) -> None:
        if isinstance(self.function, Reward):
            self.function.greet(say)
        else:
            getattr(self.function, "greet", _nothing)()

    def checkpoint(self) -> None:
        getattr(self.function, "checkpoint", _nothing)()

    def problems(self) -> list[str]:
        return getattr(self.function, "problems", list)()

    def networks(self) -> list[torch.nn.Module]:
        return getattr(self.function, "networks", list)()


def _nothing() -> None:
    pass


def as_reward(given: Reward | Callable[[Media, Prompts], Any]) -> Reward:
    """A reward as it is, anything else that can be called wrapped."""
    return given if isinstance(given, Reward) else Wrapped(given)


def check_media(media: Media) -> Media:
    """The one image contract: (N, F, 3, H, W) float, finite, in [0, 1]; a small overshoot of rounding is allowed.

    Raises:
        Fault: if the pixels are anything else.
    """
    pixels = media.pixels
    if pixels.ndim != 5 or pixels.shape[2] != 3 or not pixels.is_floating_point():
        raise Fault(f"pictures: got {tuple(pixels.shape)} {pixels.dtype}, expected (N, F, 3, H, W) float")
    low, high = torch.stack(torch.aminmax(pixels.detach())).tolist()
    if not (math.isfinite(low) and math.isfinite(high)):
        raise Fault(
            "pictures: not finite, they would be black: the decoder went beyond what its numbers hold, or the weights diverged; "
            "precision: float32 and a lower optimizer.lr are the ways out"
        )
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise Fault(f"pictures: values in [{low:.3g}, {high:.3g}], expected [0, 1]")
    return media


def numbers(output: Any, count: int) -> Floats:
    """What a reward returned as numbers (count,), NaN where there is none.

    Raises:
        ValueError: for anything but a tensor, array or list of `count` numbers or None.
    """
    expected = f"expected {count} numbers, a tensor or list of shape ({count},)"
    if isinstance(output, Tensor):
        output = output.detach().cpu().double().numpy() if not output.is_complex() else output.detach().cpu().numpy()
    try:
        given = np.asarray(output)
    except ValueError as error:  # rows of several lengths
        raise ValueError(f"returned {shown(output)}, {expected}") from error
    if given.dtype == object and all(
        value is None or isinstance(value, (int, float, np.number)) for value in given.flat
    ):
        try:
            given = given.astype(float)
        except OverflowError as error:
            raise ValueError(f"returned {shown(output)}, {expected}") from error
    if given.dtype.kind not in "fiub":
        raise ValueError(f"returned {shown(output)}, {expected}")
    if given.shape != (count,):
        raise ValueError(f"returned shape {given.shape}, {expected}")
    return given.astype(float)


def to_uint8(media: Media) -> NDArray[np.uint8]:
    """Pixels (N, F, 3, H, W) as (N, F, H, W, 3) uint8, rounded."""
    pixels = media.pixels.detach().clamp(0, 1).mul_(255).round_().to(torch.uint8)
    return pixels.permute(0, 1, 3, 4, 2).cpu().numpy()
