"""A network's calls as CUDA graphs: the same kernels as eager ones, so the same bits, launched all at once by the host.

A call is recorded when its shapes come a second time and replayed from then on: inputs are copied to where the recording read them,
outputs are copied from where it wrote them. With gradient there are two recordings, of the call and of its gradient, and one such pair
for each call whose gradient is still to come. Parameters are read where they are: whatever changes them must change them in place.
What cannot be recorded runs as it would, and that is said once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from diffalign.errors import one_line
from diffalign.models.recordings import Call, Places, Tools

MOST = 8  # sets of shapes that are kept, with and without gradient
OFTEN = 64  # recordings of a network: one that is called in ever new forms is better off without
PENDING = 2  # calls of one set of shapes whose gradient is still to come: guidance takes two
PLAIN = (bool, int, float, str, type(None), torch.dtype)


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
