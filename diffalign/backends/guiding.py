"""Guidance on some steps only: which steps, and what of a pipeline's call takes its second prediction away on the others."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign.errors import UserError

NAMES = ("guidance_scale", "true_cfg_scale", "guidance_scale_2")  # arguments of calls that guide
OFF = (
    1.0,
    0.0,
)  # at 1 two predictions cancel to the prompt's own; where guidance is added to that, it is 0 that takes it away


class GuidedSteps:
    """Which steps of a chain guidance acts on.

    Args:
        steps: the first, and one past the last; None: all.
        times: (T,) of the chain's steps, in [0, 1].
    """

    def __init__(self, steps: Sequence[int] | None, times: np.ndarray) -> None:
        self.times = times
        self.on = np.ones(len(times), dtype=bool)
        if steps is not None:
            self.on[:] = False
            self.on[steps[0] : steps[1]] = True

    def __call__(self, step: int) -> bool:
        return bool(self.on[step])

    def at(self, time: Tensor) -> Tensor:
        """Of times (N,), whether the step that is nearest to each is guided."""
        times = torch.as_tensor(self.times, dtype=torch.float64, device=time.device)
        nearest = (time.double()[:, None] - times).abs().argmin(1)
        return torch.as_tensor(self.on, device=time.device)[nearest]

    def apart(self, time: Tensor, run: Callable[[Tensor | None, bool], Tensor]) -> Tensor:
        """What `run` gives for rows at times (N,), those with guidance and those without called apart; rows None: all of them."""
        if self.on.all() or not self.on.any():
            return run(None, bool(self.on.all()))
        on = self.at(time)
        if bool((on == on[0]).all()):
            return run(None, bool(on[0]))
        rows = [torch.nonzero(on == which).flatten() for which in (True, False)]
        return torch.cat([run(rows[0], True), run(rows[1], False)])[torch.argsort(torch.cat(rows))]

    def pieces(self) -> list[tuple[list[int], bool]]:
        """All steps in order, cut where guidance begins or ends."""
        found: list[tuple[list[int], bool]] = []
        for step, on in enumerate(self.on.tolist()):
            if found and found[-1][1] == on:
                found[-1][0].append(step)
            else:
                found.append(([step], on))
        return found

    @contextmanager
    def everywhere(self) -> Iterator[None]:
        """Guidance on every step for the length of the context: what memory is measured with, as no step takes more."""
        own, self.on = self.on, np.ones_like(self.on)
        try:
            yield
        finally:
            self.on = own


def rows_of(args: Iterable[Any], kwargs: dict[str, Any]) -> int:
    """Rows of a network's call."""
    return len(next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)))


@contextmanager
def counting(networks: Iterable[torch.nn.Module]) -> Iterator[list[int]]:
    """The rows of every call of some networks, as they come."""
    rows: list[int] = []
    with ExitStack() as stack:
        for network in networks:
            hook = network.register_forward_pre_hook(
                lambda module, args, kwargs: rows.append(rows_of(args, kwargs)), with_kwargs=True
            )
            stack.callback(hook.remove)
        yield rows


def switch(pipe: Any, steps: Sequence[int], rows: Callable[[dict[str, Any]], list[int]]) -> dict[str, Any]:
    """The arguments of a pipeline's call that take its second prediction away, found by what they do to the network's rows.

    steps: those that are to be guided, for the message; rows: changed arguments -> the network's rows for one sample at some steps.

    Raises:
        UserError: where none does: guidance is an input of the network, or there is none.
    """
    taken = inspect.signature(inspect.unwrap(type(pipe).__call__)).parameters
    off: dict[str, Any] = {}
    before = left = rows(off)
    for name, value in ((name, value) for name in NAMES if name in taken for value in OFF):
        # What a pipeline without a second expert says of guidance_scale_2 is never asked for: one row a step cannot become less.
        if max(left) > 1 and name not in off and sum(found := rows({**off, name: value})) < sum(left):
            off, left = {**off, name: value}, found
    if any(now >= was for now, was in zip(left, before, strict=True)):
        raise refused(type(pipe).__name__, steps, taken)
    return off


def refused(name: str, steps: Sequence[int], taken: Iterable[str]) -> UserError:
    """What to say where guidance cannot be left out of steps; taken: names of the call's arguments."""
    more = "guidance_scale above 1 where that makes the pipeline predict twice"
    if "true_cfg_scale" in taken:
        more = "sampler.pipeline_args with true_cfg_scale above 1 and a negative_prompt, which is a second prediction"
    return UserError(
        f"sampler.guidance_steps: got {list(steps)}, {name} predicts once a step as it is called: its guidance is an input of the network, "
        f"or off, and leaving it out saves nothing; allowed is null, or {more}"
    )
