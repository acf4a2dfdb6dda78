"""From a config to the objects of a run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from diffalign.backends.diffusers import DiffusersPolicy, call_arguments
from diffalign.backends.table import policy_class
from diffalign.config import Config
from diffalign.errors import Fault, UserError, one_line
from diffalign.models import calls, compiling, decoding, encoders, loading, lora
from diffalign.models.caching import Cache
from diffalign.models.encodings import Kept
from diffalign.models.places import Adapter
from diffalign.processes import PROCESSES
from diffalign.protocols import START
from diffalign.rewards.base import Reward
from diffalign.rewards.catalog import find
from diffalign.rewards.contrast import Contrast
from diffalign.rewards.load import Judges
from diffalign.rewards.load import load as load_reward
from diffalign.rewards.narrow import Narrow
from diffalign.rewards.scorer import Scorer
from diffalign.runs import adapters
from diffalign.runs.devices import compiled, device, recorder
from diffalign.runtime import sharding
from diffalign.runtime.distributed import World
from diffalign.runtime.memory import release
from diffalign.runtime.progress import Progress, silent
from diffalign.runtime.randomness import Purpose, numpy_generator
from diffalign.training.fitting import fit
from diffalign.training.rates import factor
from diffalign.training.selection import selector
from diffalign.training.trainer import Trainer


@dataclass
class Parts:
    """What a config describes: a policy around a pipeline with LoRA, what scores its samples, and what judges them in evaluations."""

    place: loading.Place
    policy: DiffusersPolicy
    scorer: Scorer
    judges: Scorer
    frozen: tuple[Adapter, ...] = ()
    start: Adapter | None = None
    beside: dict[str, Adapter] = field(default_factory=dict)  # what stands by for the rule, by its names

    @property
    def pipe(self) -> Any:
        return self.policy.pipe


def encode_first(config: Config, world: World, say: Callable[[str], None]) -> Kept | None:
    """Encode all prompts of the run by the text encoders alone, if the config has a cache for it: they are gone before anything else
    comes. None: they are to come with the rest."""
    settings, sampler = config.prompts, config.sampler
    if settings.cache is None:
        return None
    texts = config.book.texts
    folder, budget = Path(settings.cache).expanduser(), settings.cache_gib * 2**30
    say(f"encoding {len(texts)} prompts, or finding them in {folder}")

    where = "cpu" if config.memory.encode_on == "cpu" else device(config)

    def encode() -> tuple[Kept | None, str, int]:
        pipe, _ = _loaded(config, "encoders", where)
        _check_call(config, pipe)
        taken = sum(p.nbytes for name in encoders.present(pipe) for p in getattr(pipe, name).parameters())
        arguments = call_arguments(sampler.steps, sampler.guidance_scale, sampler.pipeline_args)
        mine = texts[world.rank :: world.size]
        return *encoders.encode_all(pipe, arguments, where, folder, budget, texts, mine), taken

    kept, why_not, taken = world.together(encode)
    release()
    if why_not := next(filter(None, world.gather(why_not)), ""):
        say(f"text encoders stay: {why_not}")
        return kept and replace(kept, complete=False)
    say(f"text encoders left memory: {taken / 2**20:.1f} MiB")
    return kept


def _check_call(config: Config, pipe: Any) -> None:
    """Refuse arguments that the pipeline's call would swallow."""
    if lines := calls.unknown(pipe, config.sampler.pipeline_args):
        raise UserError(*(f"sampler.pipeline_args: {line}" for line in lines))


def _loaded(config: Config, part: loading.Part, where: str) -> tuple[Any, loading.Place]:
    return loading.load(
        config.model,
        getattr(torch, config.precision),
        where,
        config.revision,
        config.weights,
        "none" if part == "encoders" else config.memory.quantize,
        part,
    )


def build(config: Config, say: Callable[[str], None] = print, kept: Kept | None = None) -> Parts:
    """Load the pipeline, attach the LoRA, load the rewards; `say` hears what is waited for. kept: from `encode_first`."""
    sharded = config.memory.shard == "blocks"
    part: loading.Part = "rest" if kept is not None and kept.complete else "all"
    start, frozen, beside = adapters.named(config)
    # A network that is to be shared out may not fit one device: it goes there part by part.
    pipe, place = _loaded(config, part, "cpu" if sharded else device(config))
    _check_call(config, pipe)
    if config.attention not in ("auto", "native"):  # auto: where no run has decided it
        loading.attend(pipe, config.attention)
    adapters.freeze(config, pipe, frozen)
    parameters = adapters.attach(config, pipe, start)
    names = adapters.stand_by(config, pipe, beside)
    if sharded:
        _shard(config, pipe, parameters)
    if compiled(config):
        compiling.compile_blocks(pipe)
    decoding.cut(pipe, config.memory.decode)
    judging = dict.fromkeys([*config.eval_rewards, *config.rewards])
    loaded: Judges = {}
    judges = {name: _reward(config, name, say, loaded) for name in judging}
    training = {name: _narrowed(config, name, judges[name], say) for name in config.rewards}
    for name, words in config.scoring.contrast.items():
        training[name] = Contrast(training[name], words.plus, words.minus)
    offload = config.memory.judges == "offloaded"
    scorers = Scorer(training, config.rewards, offload), Scorer(judges, offload=offload)
    return Parts(place, policy(config, pipe, parameters, kept, names), *scorers, frozen, start, beside)


def bare(config: Config) -> DiffusersPolicy:
    """A config's model with what is frozen on it, nothing to train and no rewards."""
    _, frozen, _ = adapters.named(config)
    pipe, _ = _loaded(config, "all", device(config))
    _check_call(config, pipe)
    adapters.freeze(config, pipe, frozen)
    return policy(config, pipe)


def _reward(config: Config, name: str, say: Callable[[str], None], judges: Judges | None = None) -> Reward:
    scoring = config.scoring
    reward = load_reward(name, scoring.deadline, scoring.batch, scoring.frames, scoring.reduce, device(config), judges)
    if reward.grouped:
        reward.sizes = whole_groups(config, name)
    reward.greet(say)
    if config.checkpoint != "none":
        reward.checkpoint()
    return reward


def whole_groups(config: Config, name: str) -> tuple[int, ...]:
    """How many samples a group has in training and in evaluations, for a reward that compares them.

    Raises:
        UserError: if a micro-batch would hold a part of one.
    """
    sizes = {"prompts.group_size": config.prompts.group_size}
    if config.prompts.scouts is not None:
        sizes["prompts.scouts.pool"] = config.prompts.scouts.pool
    if config.prompts.allocate is not None:
        raise UserError(f"prompts.allocate: got it with {name}, which compares the samples of a group; allowed is null")
    if config.evaluation.enabled:
        sizes["evaluation.images_per_prompt"] = config.evaluation.images_per_prompt
    if problems := [
        f"{key}: got {size} with optimizer.micro_batch {config.micro_batch}, {name} compares the samples of a group; allowed are 2 or more "
        "and a micro-batch of one or several whole ones"
        for key, size in sizes.items()
        if size < 2 or config.micro_batch % size
    ]:
        raise UserError(*problems)
    return tuple(sizes.values())


def _narrowed(config: Config, name: str, wide: Reward, say: Callable[[str], None]) -> Reward:
    """A reward as it is asked in training: in bfloat16 if the config says so and it is a learned one, which has a gradient."""
    if config.memory.judge_precision != "bfloat16":
        return wide
    entry = find(name)
    if entry.narrow:
        return wide  # it is held in bfloat16 on a card as it is
    if entry.differentiable and wide.networks():
        return Narrow(_reward(config, name, say))
    say(f"memory.judge_precision: {name} has no network that is held in bfloat16, it stays as it is")
    return wide


def _shard(config: Config, pipe: Any, parameters: dict[str, torch.Tensor]) -> None:
    """Share the denoisers out; all else goes to the device whole."""
    where, denoisers = device(config), lora.denoisers(pipe)
    for module in denoisers.values():
        sharding.shard(module, parameters.values(), where)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module) and component not in denoisers.values():
            component.to(where)


def policy(
    config: Config,
    pipe: Any,
    parameters: dict[str, torch.Tensor] | None = None,
    kept: Kept | None = None,
    frozen: dict[str, str] | None = None,
) -> DiffusersPolicy:
    """The policy of a config around a loaded pipeline; frozen: see `DiffusersPolicy`.

    Raises:
        UserError: if the pipeline's call does not take the configured arguments.
        Fault: if it cannot run at all.
    """
    sampler = config.sampler
    try:
        return policy_class(pipe)(
            pipe,
            PROCESSES[sampler.process],
            steps=sampler.steps,
            noise_level=sampler.noise_level,
            guidance_scale=sampler.guidance_scale,
            guidance_steps=sampler.guidance_steps,
            one_latent=config.scoring.frames == "first_latent",
            sigmas=sampler.sigmas,
            call=sampler.pipeline_args,
            micro_batch=config.micro_batch,
            parameters=parameters,
            checkpoint=config.checkpoint,
            stretches=config.book.stretches,
            kept=kept,
            recorder=recorder(config),
            lossy=compiled(config),
            cache=None if sampler.cache is None else Cache(sampler.cache.threshold),
            fps=sampler.fps,
            frozen=frozen,
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"sampler: {type(pipe).__name__} does not accept these settings: {one_line(error)}") from error
    except RuntimeError as error:
        raise Fault(f"{type(pipe).__name__} cannot sample with these settings: {one_line(error)}") from error


def trainer(
    config: Config, parts: Parts, world: World, say: Callable[[str], None], progress: Progress = silent
) -> Trainer:
    """What updates the parts, its rule fitted into memory if it asks for that.

    Raises:
        UserError: for settings that this sampler, or so many processes, cannot run.
    """
    optimizer = config.optimizer
    if config.memory.shard == "blocks":
        parts.policy.adapts = False
    if config.make_rule().needs.reference and config.reference != "base":
        parts.policy.add_shadows([START])
    made = Trainer(
        config.make_rule(),
        parts.policy,
        parts.scorer,
        torch.optim.AdamW(
            parts.policy.parameters.values(),
            lr=optimizer.lr,
            betas=optimizer.betas,
            weight_decay=optimizer.weight_decay,
        ),
        functools.partial(config.book.draw, config.prompts.groups, config.prompts.group_size, config.seed),
        max_grad_norm=optimizer.max_grad_norm,
        seed=config.seed,
        world=world,
        max_invalid=config.scoring.max_invalid,
        notify=say,
        progress=progress,
        selector=selector(config.prompts.scouts, config.prompts.allocate, parts.policy.micro_batch),
        rate=lambda update: optimizer.lr * factor(optimizer.schedule, update, optimizer.warmup, config.updates),
    )
    batch = made.draw(0).select(range(parts.policy.micro_batch))
    fitted = fit(made.rule, parts.policy, parts.scorer, batch)
    plan = made.rule.plan(parts.policy.schedule, 0, numpy_generator(config.seed, Purpose.PLAN, 0))
    if fitted:
        say(f"fitted into memory: {', '.join(map(str, plan.updates[0]))}")
    return made
