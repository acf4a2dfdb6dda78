"""Several processes as one: each samples its share, everything that is decided is decided on what all of them found.

Start them with `accelerate launch` or `torchrun`. With one process everything here is a plain function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from diffalign.errors import Fault, Unscored, UserError, one_line
from diffalign.runtime.launcher import local_rank, neighbours, several
from diffalign.types import chunks

T = TypeVar("T")
K = TypeVar("K")


@dataclass(frozen=True)
class World:
    """The processes of a run: `rank` of `size`."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls, cuda: bool = False) -> World:
        """Meet the processes that a launcher started, if one did: it says who and where in the environment. cuda: each has a card.

        Raises:
            UserError: if there are more of them than cards.
        """
        if not dist.is_available() or not several():
            return cls()
        if cuda:
            if neighbours() > (cards := torch.cuda.device_count()):
                raise UserError(
                    f"device: got {neighbours()} processes for {cards} CUDA device{'s' * (cards > 1)}; allowed is one process each, or "
                    "device=cpu"
                )
            torch.cuda.set_device(local_rank())
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def leave(self) -> None:
        """Part from the others."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def rows(self, count: int, micro_batch: int) -> list[int]:
        """This process's share of `count` rows: every `size`-th micro-batch."""
        dealt = list(chunks(count, micro_batch))[self.rank :: self.size]
        return [row for rows in dealt for row in rows]

    def idle(self, count: int, micro_batch: int) -> int:
        """How many micro-batches fewer this process has of `count` rows than the first one."""
        dealt = -(-count // micro_batch)
        return -(-dealt // self.size) - len(range(self.rank, dealt, self.size))

    def gather(self, item: T) -> list[T]:
        """Everybody's item, in the order of ranks; a plain object, no tensors."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        with _met():
            dist.all_gather_object(items, item)
        return items

    def together(self, work: Callable[[], T]) -> T:
        """Do some work that does not communicate; if it fails anywhere it fails everywhere.

        Raises:
            Fault: if another process failed; a failure of one's own as it is.
        """
        if self.size == 1:
            return work()
        result, error = None, None
        try:
            result = work()
        except Exception as caught:
            error = caught
        problems = self.gather(None if error is None else (one_line(error), isinstance(error, Unscored)))
        if error is not None:
            raise error
        for rank, problem in enumerate(problems):
            if problem is not None:
                line, unscored = problem
                raise (Unscored if unscored else Fault)(f"process {rank}: {line}")
        return result  # type: ignore[return-value]

    def led(self, target: T) -> T:
        """An object whose methods the first process runs, with everybody getting their results; its other attributes are not for use."""
        return cast("T", target if self.size == 1 else _Led(self, target))

    def lead(self, work: Callable[[], T]) -> T:
        """Let the first process do some work, and give everybody its result."""
        return self.gather(self.together(lambda: work() if self.leads else None))[0]  # type: ignore[return-value]

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over all processes, in one go."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with _met():
            dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def average(self, metrics: dict[K, float], weight: float) -> dict[K, float]:
        """Numbers averaged over the processes that have them, by weight."""
        if self.size == 1:
            return metrics
        gathered = self.gather((metrics, weight))
        names = dict.fromkeys(name for other, _ in gathered for name in other)
        return {
            name: sum(other[name] * w for other, w in gathered if name in other)
            / sum(w for other, w in gathered if name in other)
            for name in names
        }

    def check_equal(self, parameters: dict[str, Tensor], where: str) -> None:
        """Hold the processes' parameters against each other.

        Raises:
            Fault: if they differ in a single bit.
        """
        if self.size == 1:
            return
        if len(sums := set(self.gather(checksum(parameters.values())))) > 1:
            raise Fault(f"{where}: the processes hold {len(sums)} different adapters; they must be equal")


def checksum(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Sums of the tensors' bits modulo 2^64, plain and weighted by place, each tensor's: made on their device, read at once.

    One bit that differs changes the plain one; two numbers in another order change a weighted one. An odd multiple of the highest bit is
    that bit again, whatever the place: the upper halves are weighted by themselves too.
    """
    sums: list[Tensor] = []
    for tensor in tensors:
        octets = tensor.detach().contiguous().view(torch.uint8).flatten()
        bits = torch.nn.functional.pad(octets, (0, -len(octets) % 8)).view(torch.int64)
        # Odd multipliers, so that no bit is lost beyond the highest.
        places = 2 * torch.arange(len(bits), device=bits.device) + 1
        sums += [bits.sum(), (bits * places).sum(), ((bits >> 32) * places).sum()]
    return tuple(torch.stack(sums).tolist()) if sums else ()


@contextmanager
def _met() -> Iterator[None]:
    """Say of a process that does not answer that it is gone: whatever the backend raises, there is nothing to mend here."""
    try:
        yield
    except RuntimeError as error:
        raise Fault(f"another process is gone ({one_line(error)}); the last checkpoint is kept") from error


class _Led:
    """Hands every method call to the first process."""

    def __init__(self, world: World, target: Any) -> None:
        self._world, self._target = world, target

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._target, name)
        return lambda *args, **kwargs: self._world.lead(lambda: method(*args, **kwargs))


ALONE = World()
