"""A Gaussian chain with known gradients: a few dimensions and a linear network, float64.

Prediction: (base + delta) [x, t, 1] with base fixed and delta trained from 0, so the reference model is delta = 0. With one
parameter tensor and no text it runs thousands of samples in milliseconds, and full backpropagation through it is the known
gradient that every rule is held against.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from diffalign.backends.chain import ChainPolicy
from diffalign.backends.walk import OnStep
from diffalign.processes import PROCESSES, Levels
from diffalign.processes.table import Kind
from diffalign.protocols import BASE
from diffalign.runtime.randomness import Purpose, normal
from diffalign.types import Media, Prompts, Rollout

WEIGHT = (1.0, -0.5, 0.25)


def toy_reward(media: Media, prompts: Prompts) -> Tensor:
    """Smooth and not linear in the pixels of the first three numbers, so that the order of everything matters."""
    pixels = media.pixels.flatten(1)[:, :3]
    return pixels @ pixels.new_tensor(WEIGHT) - (pixels[:, 0] - 0.3) ** 2


def grid(kind: Kind, steps: int) -> Levels:
    """Evenly spaced levels: of a rectified flow, or of an angle from nearly pure noise to none, with epsilon prediction."""
    if kind == "flow":
        return Levels.flow(np.linspace(1.0, 0.0, steps + 1))
    angle = np.linspace(1.4, 0.0, steps + 1)
    return Levels(np.cos(angle), np.sin(angle), "epsilon")


class ToyPolicy(ChainPolicy):
    """A chain of `steps` steps in `dim` (a multiple of 3) dimensions; decoding is a sigmoid, a pixel per three numbers.

    predictions: network rows to count for a sample at a step with guidance, and without; it does nothing else here.
    """

    def __init__(
        self,
        dim: int = 3,
        steps: int = 4,
        process: str = "flow_sde",
        noise_level: float = 0.7,
        micro_batch: int = 4096,
        levels: Levels | None = None,
        guidance_steps: Sequence[int] | None = None,
        predictions: tuple[int, int] = (1, 1),
    ) -> None:
        kind = PROCESSES[process]
        levels = levels or grid(kind.kind, steps)
        noise_level = min(noise_level, kind.highest)
        super().__init__(
            1000 * levels.sigma[:-1], levels, kind, noise_level, micro_batch, guidance_steps=guidance_steps
        )
        self.predictions = predictions
        generator = torch.Generator().manual_seed(0)
        self.dim = dim
        self.base = 0.4 * torch.randn(dim, dim + 2, generator=generator, dtype=torch.float64)
        self.base[:, :dim] += 0.8 * torch.eye(dim, dtype=torch.float64)
        self.delta = torch.zeros_like(self.base).requires_grad_()
        self.parameters = {"delta": self.delta}
        self.adapters: dict[str, Tensor] = {}  # frozen deltas by name
        self.taught = 1  # rows to count where frozen weights have a guidance of their own

    def network(self, x: Tensor, time: Tensor) -> Tensor:
        on = int(self.guided.at(time).sum())
        self.count(on * self.predictions[0] + (len(x) - on) * self.predictions[1])
        features = torch.cat([x, time[:, None], torch.ones_like(time)[:, None]], 1)
        return features @ (self.base + self.delta).T

    def start(self, prompts: Prompts, seeds: Sequence[int]) -> Tensor:
        return normal(seeds, (self.dim,), Purpose.TOY, like=self.base)

    def drive(self, prompts: Prompts, x: Tensor, steps: Sequence[int], on_step: OnStep) -> None:
        for step in steps:
            time = torch.full((len(x),), float(self.schedule.sigma[step]), dtype=x.dtype)
            x = on_step(step, self.network(x, time), x)

    def predict(self, part: Rollout, x: Tensor, time: Tensor) -> Tensor:
        return self.network(x, time.to(x).expand(len(x)))

    def pixels(self, prompts: Prompts, x: Tensor, whole: bool = True) -> Media:
        return Media(torch.sigmoid(x).reshape(len(x), 1, 3, 1, -1))

    @contextmanager
    def weights(self, name: str, guidance: float | None = None) -> Iterator[None]:
        own, counted = self.delta.data, self.predictions
        with torch.no_grad():
            try:
                self.predictions = counted if guidance is None else (self.taught, self.taught)
                self.delta.data = torch.zeros_like(own) if name == BASE else self.adapters[name]
                yield
            finally:
                self.delta.data, self.predictions = own, counted
