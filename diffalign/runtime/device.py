"""What torch is told of a device before anything runs on it."""

from __future__ import annotations

import torch

from diffalign.errors import UserError
from diffalign.runtime.launcher import fixed_workspaces


def on_cards() -> bool:
    """Whether there is a CUDA device."""
    return torch.cuda.is_available()


def settle(device: str) -> None:
    """Choose torch's kernels for a device, "cpu", "mps", "cuda" or "cuda:N".

    cuDNN's attention is never torch's own choice here: its backward ended FLUX.1's training in an illegal memory access (torch 2.11,
    NVIDIA H200), and gives NaN where a mask is passed and the length is 64 mod 128 (pytorch issue 196678). `attention: _native_cudnn`
    still asks for it.
    """
    if device.startswith("cuda"):
        torch.backends.cuda.enable_cudnn_sdp(False)


def undetermined(error: BaseException) -> UserError | None:
    """What a user is told of an operation that cannot add up in one order; None for any other failure."""
    if "does not have a deterministic implementation" not in str(error):
        return None
    name = str(error).partition(" does not")[0].rpartition("\n")[2]
    return UserError(
        f"deterministic: got true, {name} has no such form on this device; allowed are auto and false, and another attention if it is that"
    )


def one_order(device: str) -> None:
    """Let a device add sums up in one order, so that the same work gives the same bits; an operation that has no such form raises. A CPU
    does so anyway."""
    if device == "cpu":
        return
    fixed_workspaces()
    torch.backends.cudnn.deterministic = True
    torch.backends.cuda.enable_mem_efficient_sdp(
        False
    )  # its gradient adds in any order: masks are for plain arithmetic then
    torch.use_deterministic_algorithms(True)
