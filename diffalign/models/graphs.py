"""A network's calls as CUDA graphs: the same kernels as eager ones, so the same bits, launched all at once by the host.

A call is recorded when its shapes come a second time and replayed from then on: inputs are copied to where the recording read them,
outputs are copied from where it wrote them. With gradient there are two recordings, of the call and of its gradient, and one such pair
for each call whose gradient is still to come. Parameters are read where they are: whatever changes them must change them in place.
What cannot be recorded runs as it would, and that is said once.
"""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from diffalign.errors import one_line

MOST = 8  # sets of shapes that are kept, with and without gradient
OFTEN = 64  # recordings of a network: one that is called in ever new forms is better off without
PENDING = 2  # calls of one set of shapes whose gradient is still to come: guidance takes two
PLAIN = (bool, int, float, str, type(None), torch.dtype)

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


class Graphs:
    """A network's forward, recorded by shapes.

    Args:
        name: of the network, for what is said; network: it; forward: its own; parameters: those that are trained.
        state: what besides shapes decides what a call does: whether adapters are on.
        notify: told once what cannot be recorded; trains: whether calls with gradient are recorded too.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        forward: Callable[..., Any],
        parameters: Sequence[Tensor],
        state: Callable[[], Any],
        notify: Callable[[str], None],
        trains: bool = True,
        tools: Tools | None = None,
    ) -> None:
        self.places = Places(network, parameters)
        self.name, self.forward, self.parameters, self.state, self.notify = name, forward, parameters, state, notify
        self.tools, self.trains, self.on = tools or Tools(), trains, True
        self.seen: set[Any] = set()
        self.made = 0
        self.calls: OrderedDict[Any, list[Call]] = OrderedDict()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        gradient = torch.is_grad_enabled()
        if not self.on or (gradient and not (self.trains and self.parameters)):
            return self.forward(*args, **kwargs)
        leaves, form = tree_flatten((args, kwargs))
        if odd := [leaf for leaf in leaves if not self._takes(leaf)]:
            return self._refused(f"an argument is {_what(odd[0])}", args, kwargs)
        shapes = tuple(_what(leaf, gradient) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        name = (repr(form), shapes, gradient, self.state())
        if name not in self.seen:  # what comes once is not worth a recording
            self.seen.add(name)
            return self.forward(*args, **kwargs)
        call = next((call for call in self.calls.get(name, ()) if not call.busy), None)
        if call is None:
            if len(self.calls.get(name, ())) >= PENDING:
                return self.forward(*args, **kwargs)
            try:
                call = self._recorded(name, form, leaves, gradient)
            except RuntimeError as error:
                return self._refused(one_line(_first(error)), args, kwargs)
        if name in self.calls:
            self.calls.move_to_end(name)
        return call.run(leaves)

    def _takes(self, leaf: Any) -> bool:
        return leaf.device.type == self.tools.device if isinstance(leaf, Tensor) else isinstance(leaf, PLAIN)

    def _recorded(self, name: Any, form: Any, leaves: Sequence[Any], gradient: bool) -> Call:
        self.made += 1
        if self.made > OFTEN:
            raise RuntimeError(f"they have had more than {OFTEN} forms")
        own = [_static(leaf, gradient) for leaf in leaves]
        call = Call(self.forward, form, own, self.parameters if gradient else (), self.places)
        call.record(self.tools)
        self.calls.setdefault(name, []).append(call)
        while len(self.calls) > MOST:
            self.calls.popitem(last=False)
        return call

    def _refused(self, why: str, args: Any, kwargs: Any) -> Any:
        """Go on without recordings, and say so."""
        self.forget()
        self.notify(f"speed: calls of the {self.name} cannot be recorded ({why}), they run one kernel at a time")
        return self.forward(*args, **kwargs)

    def clear(self) -> None:
        """Give back what recordings hold."""
        self.calls.clear()
        self.seen.clear()
        self.made = 0

    def forget(self) -> None:
        """Give back what recordings hold, and make no more."""
        self.on = False
        self.clear()

    @property
    def recorded(self) -> int:
        """How many calls are recorded."""
        return sum(map(len, self.calls.values()))


def _first(error: BaseException) -> BaseException:
    """What began it: that a recording is broken is told of as an error of its own."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _static(leaf: Any, gradient: bool) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return torch.empty_like(leaf).copy_(leaf.detach()).requires_grad_(gradient and leaf.requires_grad)


def _what(leaf: Any, gradient: bool = False) -> Any:
    """What a recording is made for, of a tensor; or of something else, what it is."""
    if isinstance(leaf, Tensor):
        return (tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device.type, gradient and leaf.requires_grad)
    return f"a {type(leaf).__name__}"
