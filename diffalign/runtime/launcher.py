"""What the environment says: a launcher (`torchrun`, `accelerate launch`) of this process, a user of folders. Needs no torch."""

from __future__ import annotations

import logging
import os
from pathlib import Path


def several() -> bool:
    """Whether this is one of several processes."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1")


def local_rank() -> int:
    """Which of this machine's processes it is: the number of its device."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def neighbours() -> int:
    """How many processes this machine has of the run."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")) or 1)


def leads() -> bool:
    """Whether this is the only process or the first: the one that writes and speaks."""
    return os.environ.get("RANK", "0") in ("", "0")


def cpus() -> int:
    """How many CPUs this process may use: of a job's share of a machine, those that it was given."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def child(threads: int) -> dict[str, str]:
    """The environment of a process that shares this machine with others like it: so many threads, unless the user has said otherwise."""
    return {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", **os.environ}


def cache_folder() -> Path:
    """Where a user's programs keep what can be made again: `$XDG_CACHE_HOME`, or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def calm() -> None:
    """Let idle threads sleep instead of spin, unless the user has said otherwise: the same alone, and 0.6 of the time beside another busy
    process. It is read when torch is first imported."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def fixed_workspaces() -> None:
    """Let cuBLAS work in buffers of fixed sizes, without which its sums have no fixed order. It is read when cuBLAS starts."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def hush() -> None:
    """Keep optional packages from talking when diffusers imports them: of each other's versions, which nobody asked about."""
    for name in ("torch.utils._pytree", "bitsandbytes", "diffusers.quantizers"):
        logging.getLogger(name).setLevel(logging.ERROR)
