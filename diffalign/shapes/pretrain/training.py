"""The training loop that every embedded denoiser shares: Muon and AdamW, caption dropout, averaged weights."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from diffusers import AutoencoderTiny
from transformers import CLIPTokenizer

from diffalign.shapes.pretrain import text


class Model(Protocol):
    """A denoiser with its text encoders, trained together."""

    tokens: CLIPTokenizer

    def modules(self) -> list[torch.nn.Module]: ...
    def is_matrix(self, name: str, parameter: torch.Tensor) -> bool: ...
    def loss(self, x0: torch.Tensor, ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor: ...
    def pipeline(self, autoencoder: AutoencoderTiny) -> Any: ...


M = TypeVar("M", bound=Model)


class Muon(torch.optim.Muon):
    """torch's Muon on tensors of any rank: a convolution's kernel counts as a matrix (out, in * height * width)."""

    def __init__(self, parameters: list[torch.nn.Parameter], **settings: Any) -> None:
        self.originals = parameters
        self.views = [torch.nn.Parameter(p.data.flatten(1)) for p in parameters]  # the same storage
        super().__init__(self.views, **settings)

    def step(self, closure: Any = None) -> Any:
        for view, original in zip(self.views, self.originals, strict=True):
            view.grad = None if original.grad is None else original.grad.flatten(1)
        return super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for original in self.originals:
            original.grad = None


def optimizers(model: Model) -> list[torch.optim.Optimizer]:
    """Muon on the blocks' matrices, AdamW on everything else."""
    matrices: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for module in model.modules():
        for name, parameter in module.named_parameters():
            (matrices if model.is_matrix(name, parameter) else rest).append(parameter)
    return [
        Muon(matrices, lr=0.02, weight_decay=0.0, ns_steps=4),
        torch.optim.AdamW(rest, lr=1.5e-3, weight_decay=1e-3),
    ]


def rate(step: int, steps: int) -> float:
    """Learning-rate factor: 200 steps of warm-up, flat to 60 %, then linear to 2 %."""
    decay = min(1.0, (steps - step) / (0.4 * steps))
    return min(1.0, (step + 1) / 200) * max(0.02, decay)


def train(
    create: Callable[[], M],
    latents: torch.Tensor,
    prompts: list[str],
    steps: int,
    seed: int,
    log: Callable[[str], None],
    batch: int = 64,
    dropout: float = 0.1,
    pace: float = 1.0,
    kept: Callable[[M], None] | None = None,
) -> M:
    """Train on scaled latents (n, ...), one caption each, and return the model with averaged weights (EMA 0.999).

    dropout: share of rows whose caption is left out; pace: factor of the learning rates; kept: is given the averaged model every 100
    steps.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    model = create()
    ids = model.tokens(
        [*prompts, ""], padding="max_length", max_length=text.LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
    average = copy.deepcopy(model)
    tuners = optimizers(model)
    base = [[group["lr"] for group in tuner.param_groups] for tuner in tuners]
    started = time.perf_counter()
    for step in range(steps):
        for tuner, rates in zip(tuners, base, strict=True):
            for group, lr in zip(tuner.param_groups, rates, strict=True):
                group["lr"] = pace * lr * rate(step, steps)
        picks = torch.randint(len(latents), (batch,), generator=generator)
        rows = torch.where(torch.rand(batch, generator=generator) < dropout, len(prompts), picks)  # of captions
        loss = model.loss(latents[picks], ids[rows], generator)
        for tuner in tuners:
            tuner.zero_grad()
        loss.backward()
        for tuner in tuners:
            tuner.step()
        follow(average, model, min(0.999, (step + 1) / (step + 10)))
        if step % 100 == 0 or step == steps - 1:
            log(f"denoiser step {step} loss {loss.item():.4f} seconds {time.perf_counter() - started:.0f}")
            if kept is not None:
                kept(average)
    for module in average.modules():
        module.eval().requires_grad_(False)
    return average


@torch.no_grad()
def follow(average: Model, model: Model, decay: float) -> None:
    """average <- decay * average + (1 - decay) * model."""
    for slow, fast in zip(average.modules(), model.modules(), strict=True):
        torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), 1 - decay)
