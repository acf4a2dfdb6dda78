"""Running out of memory, told apart from every other failure and answered; and bytes that autograd keeps, counted by hooks."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from diffalign.errors import Fault, one_line

T = TypeVar("T")


class Batched(Protocol):
    """What takes samples in micro-batches; its parameters may hold gradients."""

    micro_batch: int
    parameters: dict[str, Tensor]


def out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host refused to give memory; torch's CPU allocator raises a plain RuntimeError."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def release() -> None:
    """Give back what a failed attempt held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def fitting(policy: Batched, work: Callable[[], T], notify: Callable[[str], None]) -> T:
    """Do some work; where memory does not suffice, let gradients go, halve the policy's micro-batch for good, and do it again.

    Raises:
        Fault: if one sample alone is too much.
    """
    while True:
        try:
            return work()
        except Exception as error:
            if not out_of_memory(error):
                raise
            problem = one_line(error)
        # After the handler, which would keep the failed attempt's tensors alive.
        for parameter in policy.parameters.values():
            parameter.grad = None
        release()
        if policy.micro_batch == 1:
            raise Fault(f"out of memory with one sample at a time ({problem}); try optimizer.gradient_checkpointing")
        policy.micro_batch = max(1, policy.micro_batch // 2)
        notify(f"out of memory ({problem}): going on with optimizer.micro_batch {policy.micro_batch}")


class Saved:
    """A context that adds up the storages autograd saves in it, each once; parameters are not counted, they are there anyway.

    total: bytes of what is alive now; peak: the most that was.
    """

    def __init__(self) -> None:
        self.total = self.peak = 0
        self._held: dict[int, int] = {}  # storage -> how many saved tensors use it
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor)

    def __enter__(self) -> Saved:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> _Held:
        storage = tensor.untyped_storage()
        owner = tensor if tensor._base is None else tensor._base
        counted = not isinstance(owner, torch.nn.Parameter)
        held = _Held(tensor, self, storage.data_ptr() if counted else 0, storage.nbytes())
        if counted:
            if not self._held.get(held.address):
                self.total += held.size
                self.peak = max(self.peak, self.total)
            self._held[held.address] = self._held.get(held.address, 0) + 1
        return held

    def release(self, address: int, size: int) -> None:
        """One saved tensor less on a storage."""
        self._held[address] -= 1
        if not self._held[address]:
            self.total -= size


class _Held:
    """A saved tensor; autograd drops it when the graph that needs it goes."""

    def __init__(self, tensor: Tensor, counter: Saved, address: int, size: int) -> None:
        self.tensor, self.counter, self.address, self.size = tensor, counter, address, size

    def __del__(self) -> None:
        if self.address:
            self.counter.release(self.address, self.size)


def saved_bytes(work: Callable[[], Any]) -> int:
    """What the graph of some work's result keeps."""
    with Saved() as saved:
        result = work()
        size = saved.total
    del result
    return size
