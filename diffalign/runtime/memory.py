"""Running out of memory, told apart from every other failure and answered; and bytes that are allocated, counted."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from diffalign.errors import CardFailed, Fault, one_line

T = TypeVar("T")


class Batched(Protocol):
    """What takes samples in micro-batches; its parameters may hold gradients. adapts: whether micro-batches may become smaller;
    forget: give back what it keeps only to be fast, and say whether there was anything."""

    adapts: bool
    micro_batch: int
    parameters: dict[str, Tensor]

    def forget(self) -> bool: ...


def out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host refused to give memory; torch's CPU allocator raises a plain RuntimeError, and so do libraries."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    told = ("can't allocate memory", "CUDA error: out of memory")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in told)


def release() -> None:
    """Give back what a failed attempt held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def fitting(policy: Batched, work: Callable[[], T], notify: Callable[[str], None]) -> T:
    """Do some work; where memory does not suffice, let gradients go, and what is kept only to be fast, then halve the policy's
    micro-batch for good, and do it again.

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
        forgot = policy.forget()
        release()
        if forgot:
            notify(f"out of memory ({problem}): going on without recorded calls")
            continue
        if not policy.adapts:
            raise Fault(
                f"out of memory ({problem}); processes that share a network go on together: lower optimizer.micro_batch"
            )
        if policy.micro_batch == 1:
            raise Fault(
                f"out of memory with one sample at a time ({problem}); try memory.checkpoint: both, or --vram with what the card has"
            )
        policy.micro_batch = max(1, policy.micro_batch // 2)
        notify(f"out of memory ({problem}): going on with optimizer.micro_batch {policy.micro_batch}")


class Live(TorchDispatchMode):
    """A context that adds up the storages that are allocated in it and alive, whatever allocates them: graphs, what runs again for a
    gradient, gradients themselves. What was there before is not counted. On the meta device too.

    now: bytes that are alive; peak: the most that were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary()  # storages; they die with their last tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):
            self._known.setdefault(storage, None)
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage not in self._known:
                self._known[storage], size = None, storage.nbytes()
                weakref.finalize(storage, self._freed, size)
                self.now += size
                self.peak = max(self.peak, self.now)
        return out

    def _freed(self, size: int) -> None:
        self.now -= size


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
            yield leaf.untyped_storage()


def card_fault(error: BaseException) -> bool:
    """Whether a card failed under the process, which can do nothing more there: an illegal access, an assertion in a kernel."""
    told = isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and "CUDA error:" in str(error)
    )
    return told and not out_of_memory(error)


def card_failed(error: BaseException) -> CardFailed:
    """What a user is told of it."""
    way = (
        "`diffalign doctor --card` looks for the kernel that does it, and attention=_native_math goes round attention's"
    )
    return CardFailed(f"the card failed under this process ({one_line(error)}); the last checkpoint is kept; {way}")


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most bytes that some work allocates at once beyond what is there: by the allocator's own count on a card."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with Live() as live:
        work()
    return live.peak
