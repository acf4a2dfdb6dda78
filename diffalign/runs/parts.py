"""From a config to the objects of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from diffalign.models import lora as adapters, loading, lora_files
from diffalign.backends import diffusers
from diffalign.config import Config
from diffalign.models.notes import lora_folder
from diffalign.processes import PROCESSES
from diffalign.rewards.base import Reward, greet
from diffalign.rewards.load import load as load_reward
from diffalign.errors import Fault, UserError, one_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Parts:
    """What a config describes: a policy around a pipeline with LoRA, and its rewards."""

    place: loading.Place
    policy: diffusers.DiffusersPolicy
    rewards: dict[str, Reward]
    eval_rewards: dict[str, Reward]

    @property
    def pipe(self) -> Any:
        return self.policy.pipe


def device(config: Config) -> str:
    """The device a config asks for.

    Raises:
        UserError: if it is not there.
    """
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise UserError("device: got 'cuda', torch sees no CUDA device; allowed here is cpu")
    # The process's own: `World.join` chose it.
    return "cuda" if available and config.device != "cpu" else "cpu"


def build(config: Config) -> Parts:
    """Load the pipeline, attach the LoRA, load the rewards."""
    dtype = DTYPES[config.precision]
    pipe, place = loading.load(config.model, dtype, device(config), config.revision, config.weights)
    if config.attention == "xformers":
        loading.use_xformers(pipe)
    lora = config.lora
    parameters = adapters.attach(pipe, lora.rank, lora.alpha, lora.targets, config.seed)
    if lora.start is not None:
        folder = lora_folder(lora.start)
        assert folder is not None, "the config was checked"
        try:
            lora_files.go_on_from(pipe, folder)
        except ValueError as error:
            raise UserError(f"lora.start: {folder} does not fit: {error}") from error
    names = dict.fromkeys([*config.rewards, *config.eval_rewards])
    asked = config.scoring
    loaded = {name: load_reward(name, asked.deadline, asked.batch, asked.frames, asked.reduce) for name in names}
    greet(loaded)
    if config.optimizer.gradient_checkpointing:
        for reward in loaded.values():
            if hasattr(reward, "checkpoint"):
                reward.checkpoint()
    return Parts(
        place=place,
        policy=policy(config, pipe, parameters),
        rewards={name: loaded[name] for name in config.rewards},
        eval_rewards={name: loaded[name] for name in dict.fromkeys([*config.eval_rewards, *config.rewards])},
    )


def policy(config: Config, pipe: Any, parameters: dict[str, torch.Tensor] | None = None) -> diffusers.DiffusersPolicy:
    """The policy of a config around a loaded pipeline.

    Raises:
        UserError: if the pipeline's call does not take the configured arguments.
        Fault: if it cannot run at all.
    """
    sampler = config.sampler
    try:
        return diffusers.DiffusersPolicy(
            pipe,
            PROCESSES[sampler.process],
            steps=sampler.steps,
            noise_level=sampler.noise_level,
            guidance_scale=sampler.guidance_scale,
            sigmas=sampler.sigmas,
            call=sampler.pipeline_args,
            micro_batch=config.optimizer.micro_batch,
            parameters=parameters,
            gradient_checkpointing=config.optimizer.gradient_checkpointing,
            stretches=config.book.stretches,
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"sampler: {type(pipe).__name__} does not accept these settings: {one_line(error)}") from error
    except RuntimeError as error:
        raise Fault(f"{type(pipe).__name__} cannot sample with these settings: {one_line(error)}") from error
