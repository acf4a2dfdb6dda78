"""What a user's reward is handed is its own, and what it does to the process is undone; what went wrong in it, and where."""

from __future__ import annotations

import copy
import os
import random
import re
import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffalign.errors import Fault, one_line
from diffalign.types import Media, Prompts

FAILURES = (Exception, SystemExit, GeneratorExit)  # whatever a user's code raises, but for Ctrl-C
PAUSES = (1.0, 4.0)  # seconds before what may pass is tried again
_PASSING = re.compile("Timeout|TimedOut|RateLimit|Connect|Unavailable|Overloaded|TryAgain|RemoteProtocol|Reset")
_ALONE = threading.RLock()  # generators and the working directory are the process's: one reward changes them at a time
_LIBRARIES = (Path(sysconfig.get_paths()["stdlib"]), Path(__file__).parent.parent)


def own(media: Media, prompts: Prompts) -> tuple[Media, Prompts]:
    """A sample's pixels, texts and metadata to do with as one likes; gradients pass."""
    mine = replace(
        prompts,
        text=list(prompts.text),
        group=prompts.group.copy(),
        seed=prompts.seed.copy(),
        group_seed=prompts.group_seed.copy(),
        metadata=copy.deepcopy(prompts.metadata),
    )
    return Media(media.pixels.clone(), media.fps), mine


@contextmanager
def staying() -> Iterator[None]:
    """The working directory is afterwards what it was."""
    place = _here()
    try:
        yield
    finally:
        if place is not None and _here() != place:
            with suppress(OSError):
                os.chdir(place)


@contextmanager
def switches() -> Iterator[None]:
    """What torch and Python do by default, for everybody, is afterwards what it was."""
    before = [(setter, getter()) for getter, setter in _SWITCHES]
    hooks = [(kept, dict(kept)) for kept in _hooks()]
    try:
        yield
    finally:
        for (getter, _), (setter, value) in zip(_SWITCHES, before, strict=True):
            if getter() != value:
                setter(value)
        for kept, was in hooks:
            if kept != was:
                kept.clear()
                kept.update(was)


def _hooks() -> list[Any]:
    """torch's tables of hooks on every module."""
    found = vars(torch.nn.modules.module)
    return [table for name, table in found.items() if name.startswith("_global_") and isinstance(table, dict)]


def _attribute(place: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    return (lambda: getattr(place, name)), (lambda value: setattr(place, name, value))


def _autocast(kind: str) -> list[tuple[Callable[[], Any], Callable[[Any], Any]]]:
    return [
        (lambda: torch.is_autocast_enabled(kind), lambda on: torch.set_autocast_enabled(kind, on)),
        (lambda: torch.get_autocast_dtype(kind), lambda dtype: torch.set_autocast_dtype(kind, dtype)),
    ]


_SWITCHES: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, lambda device: torch.set_default_device(None if device.type == "cpu" else device)),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    _attribute(torch.backends.mkldnn, "enabled"),
    _attribute(torch.backends.cudnn, "enabled"),
    _attribute(torch.backends.cudnn, "benchmark"),
    _attribute(torch.backends.cudnn, "deterministic"),
    (sys.getrecursionlimit, sys.setrecursionlimit),
    *_autocast("cpu"),
    *_autocast("cuda"),
]


@contextmanager
def undisturbed(prompts: Prompts) -> Iterator[None]:
    """The global generators begin at a place that the samples decide, so that a seed gives the same scores again; afterwards they, and the
    working directory, are what they were. One reward at a time: not for those that score in the background."""
    with _ALONE, staying(), switches():
        seed = int(np.bitwise_xor.reduce(np.asarray(prompts.seed, dtype=np.uint64)) % np.uint64(2**32))
        numpys, pythons = np.random.get_state(), random.getstate()
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        try:
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(seed)
                np.random.seed(seed)
                random.seed(seed)
                yield
        finally:
            np.random.set_state(numpys)
            random.setstate(pythons)


def _here() -> Path | None:
    try:
        return Path.cwd()
    except OSError:  # it was deleted
        return None


def passing(error: BaseException) -> bool:
    """Whether a failure may be another one's, and pass: connections, timeouts, too many requests."""
    if isinstance(error, (Fault, FileNotFoundError, PermissionError, IsADirectoryError)):
        return False
    return isinstance(error, OSError) or any(_PASSING.search(kind.__name__) for kind in type(error).__mro__)


def why(error: BaseException) -> str:
    """A reward's failure as one line, with the last line of the user's own code that it came through."""
    if isinstance(error, Fault):
        return str(error)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if users(frame.filename)]
    return f"{one_line(error)} ({frames[-1].filename} line {frames[-1].lineno})" if frames else one_line(error)


def users(file: str) -> bool:
    """Whether a file of code is the user's: not installed, not the interpreter's, not ours."""
    path = Path(file)
    packaged = {"site-packages", "dist-packages"} & set(path.parts)
    return path.is_absolute() and not packaged and not any(library in path.parents for library in _LIBRARIES)
