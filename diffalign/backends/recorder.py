"""The seam: a scheduler that stands in for the pipeline's own while the pipeline runs its own loop.

diffusers pipelines hand the guided prediction to `scheduler.step`. The stand-in cuts the timesteps to some steps and lets us
decide what comes next, so the pipeline's `__call__` becomes sampling, replay, prediction at any time and, with no steps,
decoding. It is a subclass of the scheduler it replaces, with the same config, so the pipeline sees nothing unusual.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.models import lora
from diffalign.processes import PROCESSES, Levels, linear_sigmas
from diffalign.processes.table import Kind

Sigmas = Literal["pipeline", "linear"]


NEEDS = ("prompt", "generator", "num_inference_steps", "output_type")  # arguments that a pipeline's call must have


def unfit(pipe: Any) -> list[str]:
    """What keeps a pipeline from being driven through its scheduler, as far as can be seen without running it.

    The seam's contract: the call starts from what `prepare_latents` returns, sets its timesteps by `scheduler.set_timesteps`, hands every
    prediction to `scheduler.step` once a timestep and goes on with what that returns. What the call does is held while it runs.
    """
    scheduler = getattr(pipe, "scheduler", None)
    missing = [f"its call has no {name}" for name in NEEDS if name not in _parameters(pipe)]
    missing += [] if lora.denoisers(pipe) else [f"it has no denoiser under the names {', '.join(lora.DENOISERS)}"]
    missing += [] if hasattr(pipe, "prepare_latents") else ["it has no prepare_latents, where its start is given"]
    if scheduler is None:
        return [*missing, "it has no scheduler"]
    return missing + [
        f"its {type(scheduler).__name__} has no {name}"
        for name in ("set_timesteps", "step")
        if not hasattr(scheduler, name)
    ]


def _parameters(pipe: Any) -> Mapping[str, Any]:
    return inspect.signature(inspect.unwrap(type(pipe).__call__)).parameters


def refused(pipe: Any, why: str) -> UserError:
    """What to say of a pipeline that breaks the seam's contract."""
    return UserError(
        f"model: its {type(pipe).__name__} cannot be trained through the scheduler: {why}; allowed are pipelines that prepare_latents, "
        "set_timesteps and call scheduler.step once a timestep, or a policy of its own in diffalign.backends.table"
    )


class ContractError(Exception):
    """A pipeline's call does not do what the seam needs of it; the message says what."""


class _Recording:
    """Mixed in before a scheduler's own class."""

    steps: list[int]
    forced: Tensor | None
    on_step: Callable[[int, Tensor, Tensor], Tensor]
    linear: bool
    cursor: int

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.cursor == len(self.steps):
            raise ContractError("it calls scheduler.step more than once a timestep")
        latent = self.on_step(self.steps[self.cursor], model_output, sample)
        self.cursor += 1
        if kwargs.get("return_dict", True):
            from diffusers.schedulers.scheduling_utils import SchedulerOutput

            return SchedulerOutput(prev_sample=latent)
        return (latent,)


def stand_in(scheduler: Any, kind: Kind, sigmas: Sigmas) -> Any:
    """A recording copy of a scheduler; `sigmas: linear` spaces noise levels evenly from 1 before any shift.

    Of a flow's scheduler, solvers of higher order included, the levels are taken; steps are our own. A
    DDPM-like scheduler of any class is taken as DDIM with its config, as their configs are made to be exchanged.

    Raises:
        UserError: if the scheduler is of another kind, or clips what it denoises.
    """
    scheduler = _of_kind(scheduler, kind, sigmas)
    base = type(scheduler)

    @functools.wraps(base.set_timesteps)  # some pipelines inspect the signature
    def set_timesteps(self: Any, num_inference_steps: int | None = None, *args: Any, **kwargs: Any) -> None:
        if self.linear:
            count = num_inference_steps if num_inference_steps is not None else len(kwargs["sigmas"])
            kwargs["sigmas"] = linear_sigmas(count)
            num_inference_steps = None
        base.set_timesteps(self, num_inference_steps, *args, **kwargs)
        self.full_timesteps, self.full_sigmas = self.timesteps, getattr(self, "sigmas", None)
        self.cursor = 0
        self.timesteps = self.timesteps[self.steps] if self.forced is None else self.forced.to(self.timesteps.device)

    recording = copy.deepcopy(scheduler)
    recording.__class__ = type("Recording" + base.__name__, (_Recording, base), {"set_timesteps": set_timesteps})
    recording.linear = sigmas == "linear"
    recording.forced = None
    recording.steps = []
    recording.on_step = _unexpected
    return recording


def original(recording: Any) -> Any:
    """The scheduler that a stand-in stands in for, as it was last set, before its first step."""
    own = copy.deepcopy(recording)
    own.__class__ = next(kind for kind in type(own).__mro__ if not issubclass(kind, _Recording))
    own.timesteps = own.full_timesteps
    return own


def as_ddim(scheduler: Any) -> Any:
    """DDIM on a DDPM-like scheduler's config, without clipping: what training walks and samples of its adapters use."""
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_config(scheduler.config, clip_sample=False, thresholding=False)


def _of_kind(scheduler: Any, kind: Kind, sigmas: Sigmas) -> Any:
    from diffusers import DDIMScheduler

    name, config = type(scheduler).__name__, scheduler.config
    solver = bool(config.get("use_flow_sigmas"))  # of flows, among those that know both kinds
    flow = getattr(scheduler, "sigmas", None) is not None and (solver or hasattr(config, "shift"))
    ddpm = hasattr(scheduler, "alphas_cumprod") and not solver
    if not (flow if kind == "flow" else ddpm):
        fits = [key for key, process in PROCESSES.items() if process.kind == ("flow" if flow else "ddpm")]
        allowed = ", ".join(fits) if flow or ddpm else "none"
        wanted = "flow-matching" if kind == "flow" else "DDPM-like"
        raise UserError(
            f"sampler.process: got one for {wanted} schedulers, the pipeline has {name}; allowed with that: {allowed}"
        )
    if kind == "flow":
        return scheduler
    if sigmas == "linear":
        raise UserError(f"sampler.sigmas: got 'linear', {name} has timesteps; allowed is pipeline")
    if isinstance(scheduler, DDIMScheduler) and (config.clip_sample or config.thresholding):
        raise UserError(
            f"model: its {name} clips x_0 at every step (clip_sample or thresholding), which samplers here do not; "
            "set both to false in its scheduler_config.json"
        )
    return as_ddim(scheduler)


def levels(recording: Any, kind: Kind) -> Levels:
    """The noise levels of the timesteps that a stand-in was last set to.

    Raises:
        ValueError: if they do not fall, or the scheduler's prediction type is unknown.
        UserError: if the scheduler takes several calls of the network a step.
    """
    name, count = type(recording).__name__.removeprefix("Recording"), len(recording.full_timesteps)
    if count != recording.num_inference_steps:
        raise UserError(
            f"model: its {name} takes {count} calls of the network for {recording.num_inference_steps} steps; allowed are schedulers of "
            "one call a step, such as FlowMatchEulerDiscreteScheduler"
        )
    if kind == "flow":
        sigma = recording.full_sigmas.double().cpu().numpy()
        # UniPC takes 1e-6 off a first level of 1 to spare its logarithm; the start is pure noise all the same, and Flow-SDE's
        # noise of sqrt(sigma / (1 - sigma)) would be a thousand times too strong.
        return Levels.flow(np.where(sigma > 1 - 1e-5, 1.0, sigma))
    times, config = recording.full_timesteps.cpu().long(), recording.config
    signal, last = recording.alphas_cumprod.double().cpu(), recording.final_alpha_cumprod.double().cpu()
    # diffusers' step goes N // T timesteps down, which with some spacings is not where the next one begins.
    ends = times - config.num_train_timesteps // len(times)
    to = torch.where(ends >= 0, signal[ends.clamp(min=0)], last).numpy()
    abar = torch.cat([signal[times], last[None]]).numpy()
    return Levels(np.sqrt(abar), np.sqrt(1 - abar), config.prediction_type, (np.sqrt(to), np.sqrt(1 - to)))


def _unexpected(step: int, prediction: Tensor, latent: Tensor) -> Tensor:
    raise RuntimeError(f"step {step} was not asked for")


def first(output: Any) -> Tensor:
    """The latents among what `prepare_latents` returned."""
    return output[0] if isinstance(output, tuple) else output


def swap_first(output: Any, latent: Tensor) -> Any:
    """What `prepare_latents` returned, with its latents replaced, in the dtype and on the device they came in."""
    prepared = first(output)
    if prepared.shape != latent.shape:
        raise RuntimeError(
            f"the pipeline prepares latents {tuple(prepared.shape)}, the rollout holds {tuple(latent.shape)}"
        )
    latent = latent.to(device=prepared.device, dtype=prepared.dtype)
    return (latent, *output[1:]) if isinstance(output, tuple) else latent
