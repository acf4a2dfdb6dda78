"""What is done to a policy's trained parameters: noise on them for some steps, slow copies, other values for a while."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from diffalign.protocols import BASE, START
from diffalign.runtime.randomness import Purpose, normal

NO_SHIFT: tuple[int, frozenset[int], float] = (0, frozenset(), 0.0)  # draw, steps, scale


class Trained(ABC):
    """A holder of trained parameters, by name, and of shadows: slow copies of them, by name each."""

    parameters: dict[str, Tensor]

    def __init__(self) -> None:
        self.shadows: dict[str, dict[str, Tensor]] = {}
        self._shift = NO_SHIFT
        self.lossy = False

    @property
    def exact(self) -> bool:
        """Whether a replay must reproduce a rollout bit for bit (float32 or wider on the CPU, not compiled)."""
        return not self.lossy and all(
            p.device.type == "cpu" and p.dtype in (torch.float32, torch.float64) for p in self.parameters.values()
        )

    # -- noise

    def shifts(self, step: int) -> bool:
        """Whether a step is walked with noise on the parameters."""
        return step in self._shift[1]

    def _direction(self, draw: int, step: int) -> dict[str, Tensor]:
        """Standard normal noise of the parameters' shapes, a function of draw and step alone."""
        return {
            k: normal([draw], p.shape, Purpose.DIRECTION, step, index, like=p)[0]
            for index, (k, p) in enumerate(self.parameters.items())
        }

    @contextmanager
    def shifted(self, draw: int, steps: Collection[int], scale: float) -> Iterator[None]:
        """Walk each of some steps with parameters + scale * its own noise, without gradient, for the length of the context."""
        self._shift = draw, frozenset(steps), scale
        try:
            with torch.no_grad():
                yield
        finally:
            self._shift = NO_SHIFT

    def along(self, draw: int, steps: Collection[int]) -> Tensor:
        """<parameters, sum of the steps' noises>: its gradient is that sum."""
        noises = [self._direction(draw, step) for step in steps]
        return torch.stack([(p * sum(noise[k] for noise in noises)).sum() for k, p in self.parameters.items()]).sum()

    @contextmanager
    def moved(self, step: int | None) -> Iterator[None]:
        """With the noise of one step on the parameters, for the length of the context; None: without."""
        if step is None:
            yield
            return
        draw, _, scale = self._shift
        noise = self._direction(draw, step)
        with self._swapped({k: p.data + scale * noise[k] for k, p in self.parameters.items()}):
            yield

    @contextmanager
    def _swapped(self, values: dict[str, Tensor]) -> Iterator[None]:
        """Other values for the parameters, for the length of the context."""
        # In place: recorded calls read them where they are. By `data`: a graph that is there already holds them, and sees them as they were
        # when its gradient is taken.
        own = [p.data for p in self.parameters.values()]
        kept = [p.clone() for p in own]
        try:
            torch._foreach_copy_(own, [values[k] for k in self.parameters])
            yield
        finally:
            torch._foreach_copy_(own, kept)

    # -- shadows: slow copies of the parameters

    def add_shadows(self, names: Iterable[str]) -> None:
        """Start a shadow per name at the current parameters."""
        for name in names:
            self.shadows.setdefault(name, {k: p.detach().clone() for k, p in self.parameters.items()})

    @torch.no_grad()
    def follow(self, decays: dict[str, float]) -> None:
        """shadow <- decay * shadow + (1 - decay) * parameters: 0 copies, 1 freezes."""
        for name, decay in decays.items():
            for k, slow in self.shadows[name].items():
                slow.lerp_(self.parameters[k].to(slow.dtype), 1 - decay)

    @contextmanager
    def shadow(self, name: str) -> Iterator[None]:
        """Use a shadow's parameters, without gradient, for the length of the context."""
        with torch.no_grad(), self._swapped(self.shadows[name]):
            yield

    # -- frozen weights

    @abstractmethod
    def weights(self, name: str, guidance: float | None = None) -> AbstractContextManager[None]:
        """Frozen weights by name in place of the trained ones, `base` for none, without gradient, for the length of the context.
        guidance: their own scale, None: the sampler's."""

    def reference(self) -> AbstractContextManager[None]:
        """The model before training, or what it was set to since, without gradient, for the length of the context."""
        return self.shadow(START) if START in self.shadows else self.weights(BASE)
