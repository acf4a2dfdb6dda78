"""What a user's reward is handed is its own, and what it does to the process is undone; what went wrong in it, and where."""

from __future__ import annotations

import copy
import os
import random
import re
import sysconfig
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from diffalign.errors import Fault, one_line
from diffalign.types import Media, Prompts

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
def undisturbed(prompts: Prompts) -> Iterator[None]:
    """The global generators begin at a place that the samples decide, so that a seed gives the same scores again; afterwards they, and the
    working directory, are what they were. One reward at a time: not for those that score in the background."""
    with _ALONE, staying():
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
