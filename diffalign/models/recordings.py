"""One call of a network as a CUDA graph, with its gradient: what is recorded, where it reads and writes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

Replay = Callable[[], None]
Record = Callable[[Callable[[], None]], Replay]  # runs some work so that it can be done again at the same addresses


def cuda_record() -> Record:
    """A recorder whose recordings share their memory: those of one call and its gradient, replayed in turn."""
    pool = torch.cuda.graph_pool_handle()

    def record(work: Callable[[], None]) -> Replay:
        graph = torch.cuda.CUDAGraph()
        collects = gc.isenabled()
        gc.disable()  # what it would take apart meanwhile may be on the card, which ends the recording
        try:
            # Other threads, a reward's, go on with their own work.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                work()
        finally:
            if collects:
                gc.enable()
        return graph.replay

    return record


def warm_up(work: Callable[[], None]) -> None:
    """What is made at a first call, workspaces and tables of positions, is made before the recording: on a stream of its own, as it is."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)


@dataclass
class Tools:
    """What records; another on a machine without a card, to try what is around it."""

    record: Callable[[], Record] = cuda_record
    warm_up: Callable[[Callable[[], None]], None] = warm_up
    device: str = "cuda"


class Places:
    """Where a network has its trained parameters, so that a recording can have leaves of its own there, of the same memory.

    A leaf's node of the gradient's graph belongs to the stream it was made on, and lives as long as the gradient of some call is to come.
    A recording that met one of another stream would have to wait for that stream, which ends it.
    """

    def __init__(self, network: nn.Module, parameters: Sequence[Tensor]) -> None:
        index = {id(p): k for k, p in enumerate(parameters)}
        self.parameters = parameters
        self.names = [
            (module, name, index[id(p)])
            for module in network.modules()
            for name, p in module._parameters.items()
            if id(p) in index
        ]

    @contextmanager
    def taken(self, own: Sequence[Tensor]) -> Iterator[None]:
        """The network with other leaves, if there are any."""
        for module, name, index in self.names if own else ():
            module._parameters[name] = own[index]  # type: ignore[assignment]
        try:
            yield
        finally:
            for module, name, index in self.names if own else ():
                module._parameters[name] = self.parameters[index]  # type: ignore[assignment]


@dataclass
class Call:
    """A recorded call: inputs where it reads them, outputs where it wrote them; with gradient also those of outputs and inputs.

    busy: it holds what a gradient still needs.
    """

    work: Callable[..., Any]
    form: Any
    leaves: list[Any]  # the arguments: static tensors, and what is no tensor
    parameters: Sequence[Tensor]  # what gets gradient besides the inputs that require it; empty: no gradient
    places: Places  # where the network has them
    busy: bool = False
    own: Sequence[Tensor] = ()  # the parameters as the recording knows them
    outputs: list[Any] = field(default_factory=list)
    gradients: tuple[Tensor | None, ...] = ()

    def record(self, tools: Tools) -> None:
        """Record it; as `torch.cuda.make_graphed_callables` does, for arguments of any structure."""
        self.own = [nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in self.parameters]
        tools.warm_up(self._both)
        self.outputs, self.gradients = [], ()  # the memory of the trial goes before the recording takes its own
        record = tools.record()
        self.forward = record(self._forward)
        if self.parameters:
            self.cotangents = [torch.empty_like(out) for out in self._carrying]
            self.backward = record(self._backward)

    def _both(self) -> None:
        self._forward()
        if self.parameters:
            self.cotangents = [torch.zeros_like(out) for out in self._carrying]
            self._backward()

    def _forward(self) -> None:
        args, kwargs = tree_unflatten(self.leaves, self.form)
        with self.places.taken(self.own), torch.set_grad_enabled(bool(self.parameters)):
            self.outputs, self.shape = tree_flatten(self.work(*args, **kwargs))

    def _backward(self) -> None:
        with self.places.taken(self.own):  # blocks may run again
            self.gradients = torch.autograd.grad(self._carrying, self.wanted, self.cotangents, allow_unused=True)

    @property
    def _carrying(self) -> list[Tensor]:
        return [out for out in self.outputs if isinstance(out, Tensor) and out.requires_grad]

    @property
    def wanted(self) -> list[Tensor]:
        return [*(x for x in self.leaves if isinstance(x, Tensor) and x.requires_grad), *self.own]

    @torch.no_grad()
    def fill(self, leaves: Sequence[Any]) -> None:
        """Copy arguments to where the recording reads them."""
        pairs = [(own, new) for own, new in zip(self.leaves, leaves, strict=True) if isinstance(own, Tensor)]
        torch._foreach_copy_([own.detach() for own, _ in pairs], [new.detach() for _, new in pairs])

    def run(self, leaves: Sequence[Any]) -> Any:
        """The call with other arguments of the same shapes."""
        self.fill(leaves)
        if not self.parameters:
            self.forward()
            return tree_unflatten([out.clone() if isinstance(out, Tensor) else out for out in self.outputs], self.shape)
        given = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
        found = iter(_Replayed.apply(self, *given, *self.parameters))
        outs = [next(found) if isinstance(out, Tensor) else out for out in self.outputs]
        return tree_unflatten(outs, self.shape)


class _Held:
    """That a call holds what a gradient needs, until that was taken or nobody can take it any more."""

    def __init__(self, call: Call) -> None:
        self.call: Call | None = call
        call.busy = True

    def take(self) -> Call:
        if self.call is None:
            raise RuntimeError("the gradient of a recorded call can be taken once")
        call, self.call = self.call, None
        return call

    def __del__(self) -> None:
        if self.call is not None:
            self.call.busy = False


class _Replayed(torch.autograd.Function):
    """A recorded call and its recorded gradient."""

    @staticmethod
    def forward(ctx: Any, call: Call, *_: Tensor) -> tuple[Tensor, ...]:
        call.forward()
        ctx.held = _Held(call)
        outs = [out for out in call.outputs if isinstance(out, Tensor)]
        copies = tuple(out.detach().clone() for out in outs)
        ctx.carrying = [out.requires_grad for out in outs]
        ctx.mark_non_differentiable(*(copy for copy, carries in zip(copies, ctx.carrying, strict=True) if not carries))
        return copies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        call = ctx.held.take()
        given = [g for g, carries in zip(gradients, ctx.carrying, strict=True) if carries]
        torch._foreach_copy_(call.cotangents, given)
        call.backward()
        found = [g for g in call.gradients if g is not None]
        copies = [torch.empty_like(g) for g in found]
        torch._foreach_copy_(copies, found)
        call.busy = False
        made = iter(copies)
        return (None, *(None if g is None else next(made) for g in call.gradients))
