"""What one update does and costs, before any weight is loaded.

Network rows come from running the rule itself once on a toy chain with the pipeline's schedule. FLOPs come from counting one
step of the pipeline's own code, built from its configs with random weights.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from diffalign.backends.diffusers import DiffusersPolicy
from diffalign.backends.toy import ToyPolicy
from diffalign.config import Config
from diffalign.errors import UserError, one_line
from diffalign.models import lora as adapters
from diffalign.models.untrained import random_pipeline
from diffalign.planning import architectures, remarks
from diffalign.planning.bounds import Bound, big
from diffalign.planning.demand import Demand, demand
from diffalign.planning.facts import Facts, facts, parameters_of, toy
from diffalign.processes import Levels
from diffalign.prompts import book
from diffalign.rewards.scorer import Scorer
from diffalign.rules import Rule
from diffalign.runs import parts as build
from diffalign.runtime.randomness import Purpose, numpy_generator
from diffalign.runtime.words import duration, folded
from diffalign.shapes import models
from diffalign.training.fitting import fit
from diffalign.training.selection import selector
from diffalign.training.trainer import Trainer
from diffalign.types import Media, Plan, Prompts, Schedule


@dataclass(frozen=True)
class Cost:
    """Of one update: samples that are learnt from, scouts that choose them, network rows, bytes of trajectories kept, FLOPs of the network
    and of decoding."""

    plan: Plan
    schedule: Schedule
    samples: int
    scouts: int
    rows_forward: int
    rows_backward: int
    stored_bytes: int
    parameters: int
    trained: int
    flops: float
    decode_flops: float
    notes: tuple[str, ...]
    updates: int
    demand: Demand | None = None  # memory, where it is known

    def lines(self, bound: Bound | None, told: bool = False) -> list[str]:
        """A report, what it takes first; `bound`: what to hold its time against, None: nothing is known; told: whether it fits was said."""
        noisy = [k for k, on in enumerate(self.plan.noise) if on and self.schedule.std[k] > 0]
        std = [f"{self.schedule.std[k]:.3f}" for k in noisy]
        chosen = f", chosen by {self.scouts} scouts that are scored too" if self.scouts else ""
        return [
            self._time(bound),
            *(self.demand.lines(told) if self.demand else ()),
            *(f"note        {note}" for note in self.notes),
            f"sampler     {self.schedule.steps} steps to level {self.plan.stop}, noise on steps {folded(noisy)}",
            *([f"std         {' '.join(std)}"] if std else []),
            *remarks.steps(self.plan),
            f"samples     {self.samples} an update{chosen}",
            f"rows        {self.rows_forward} forward, of them {self.rows_backward} with backward",
            f"stored      {self.stored_bytes / 2**20:.1f} MiB of trajectories",
            f"parameters  {self.parameters / 1e6:.2f} M in the denoiser, {self.trained / 1e6:.3f} M trained",
            f"flops       {big(self.flops)} network, {big(self.decode_flops)} decoding, per update",
        ]

    def _time(self, bound: Bound | None) -> str:
        total = self.flops + self.decode_flops
        if bound is None:
            return f"time        not known without a card whose rate is: --card 4090; {big(total)}FLOP an update"
        once = total / bound.rate
        all_, usual = once * self.updates, ""
        if bound.measured is not None:
            low, high = bound.measured
            each, whole = (f"{duration(time * low)} to {duration(time * high)}" for time in (once, all_))
            usual = (
                f"; networks measured on an H200 took {low:g} to {high:g} times such a bound: here {each}, all {whole}"
            )
        least = f"an update takes at least {duration(once)} on {bound.where}; {self.updates} updates {duration(all_)}"
        return f"time        {least}, evaluations not counted{usual}"


@dataclass(frozen=True)
class Network:
    """What a pipeline's network costs: rows a sample and step takes (2 with guidance by two predictions), with guidance and on steps that
    are without; FLOPs of a row's forward,
    and of one with all that its gradient takes; of decoding a sample, without and with gradient; numbers in a latent; parameters."""

    calls: tuple[int, int]
    row: float
    trained_row: float
    decode: float
    trained_decode: float
    latent: int
    parameters: int
    trained: int
    taught: int = 1  # rows that a prediction with the teachers' own guidance takes


def count(config: Config, known: Facts | None = None) -> Cost:
    """Count one update of a config; `known`: of its model, if they were counted before.

    Raises:
        UserError: if the model is neither embedded, nor a local folder, nor known by its architecture.
    """
    folder = models.path(config.model) or Path(config.model)
    if not models.path(config.model) and architectures.name_of(config.model) is not None:
        if config.make_rule().needs.graph_bytes:
            raise UserError("rule.memory_gib: plan cannot fit depth and span into memory without the model's folder")
        return _outline(config, known or facts(config))
    if not (folder / "model_index.json").is_file():
        names = ", ".join([*models.names(), *architectures.known()])
        raise UserError(f"model: got {config.model!r}; plan reads local folders, and knows {names}")
    try:
        with adapters.quiet():
            pipe = random_pipeline(folder)
    except UserError:
        raise
    except Exception as error:  # a folder that diffusers did not write, or a class it does not have
        raise UserError(f"model: cannot build {config.model!r}: {one_line(error)}") from error
    lora = config.lora
    trained = adapters.attach(pipe, lora.rank, lora.alpha, lora.targets, config.seed)
    policy = build.policy(config, pipe, trained)
    rule = config.make_rule()
    batch = book.fixed([{"prompt": "a"}], config.micro_batch, 0)
    notes = []
    if fit(rule, policy, Scorer({"toy": _toy_reward}), batch):
        notes.append("what is auto was fitted without the reward's own graph, which a run counts")
    network = _network(policy, *parameters_of(adapters.denoisers(pipe), trained), config.rule.get("teacher_guidance"))
    return _cost(config, rule, policy.levels, policy.schedule, network, notes)


def _outline(config: Config, found: Facts) -> Cost:
    """The same for a model on the hub, from its architecture alone."""
    given = architectures.sizes(config)
    chain = toy(config)
    latent = int(np.prod(architectures.dimension(architectures.entry(config)["latent"], given)))
    network = Network(
        (found.rows, architectures.unguided(config)),
        found.row.forward,
        found.row.both,
        found.decode.forward,
        found.decode.both,
        latent,
        found.linear + found.other,
        found.trained,
        architectures.predictions(_as_taught(config)),
    )
    notes = ["the model is known by its architecture alone: noise levels are even ones"]
    if not found.decoder:
        notes.append("its decoder is not known here and not counted")
    if config.memory.shard != "none":
        notes.append("memory.shard: the denoiser is counted whole, each process holds its part of it")
    if config.memory.quantize == "nf4":
        notes.append("memory.quantize: nf4 needs a CUDA device")
    if found.plan.pathwise:
        notes.append("what the rewards' own graph takes is not counted")
    counted = _cost(config, config.make_rule(), chain.levels, chain.schedule, network, notes)
    return replace(counted, demand=demand(config, found))


def _as_taught(config: Config) -> Config:
    """The config with the teachers' guidance as the sampler's."""
    own = config.rule.get("teacher_guidance")
    guidance = config.sampler.guidance_scale if own is None else own
    return config.model_copy(update={"sampler": config.sampler.model_copy(update={"guidance_scale": guidance})})


def _cost(config: Config, rule: Rule, levels: Levels, schedule: Schedule, network: Network, notes: list[str]) -> Cost:
    """An update of a rule from what one row of its network costs."""
    plans = [rule.plan(schedule, k, numpy_generator(config.seed, Purpose.PLAN, k)) for k in range(20)]
    if any(other != plans[0] for other in plans):
        each = (
            "every prompt of every update; this is one" if rule.needs.apart else "every update; this is the first one's"
        )
        notes = [*notes, f"the plan is drawn anew for {each}"]
    plan = plans[0]
    forward, backward, drawn = _rows(config, rule, levels, network.calls, network.taught)
    everywhere = forward
    if config.sampler.guidance_steps is not None:
        everywhere, *_ = _rows(config, rule, levels, (network.calls[0],) * 2, network.taught)
    notes = [*config.told, *notes, *remarks.weights(config, rule), *remarks.cache(config)]
    notes += remarks.few_steps(config, rule)
    notes += [
        *remarks.guidance(config, forward, everywhere),
        *remarks.anchored(rule, drawn),
        remarks.evaluations(config),
    ]
    again = backward if config.checkpoint in ("spans", "both") else 0  # whole calls that run again for the gradient
    inside = backward if config.checkpoint in ("blocks", "both") else 0  # and block by block, within them
    nodes = sum(int(np.prod(plan.branch[:t])) for t in plan.levels)
    noisy = sum(int(np.prod(plan.branch[: t + 1])) for t in plan.rewalked if t < plan.stop and plan.noise[t])
    leaves = config.samples_per_update * int(np.prod(plan.branch[: plan.stop]))
    scouts = config.scouts_per_update
    return Cost(
        plan,
        schedule,
        leaves,
        scouts,
        forward + again,
        backward,
        4 * network.latent * config.samples_per_update * (nodes + noisy),
        network.parameters,
        network.trained,
        network.row * (forward + again + inside - backward) + network.trained_row * backward,
        network.decode * (leaves * (plan.scored + 2 * plan.perturbed) + scouts)
        + network.trained_decode * leaves * plan.pathwise,
        tuple(notes),
        config.updates,
    )


def _toy_reward(media: Media, given: Prompts) -> torch.Tensor:
    return media.pixels.flatten(1).sum(1)


def _rows(config: Config, rule: Rule, levels: Levels, calls: tuple[int, int], taught: int) -> tuple[int, int, int]:
    """Rows of one update, (forward, with backward), and of what is drawn once before the first, counted on a toy chain with the same
    levels; calls: of a sample at a step with guidance, and at one without."""
    sampler = config.sampler
    toy = ToyPolicy(
        process=sampler.process,
        noise_level=sampler.noise_level,
        levels=levels,
        micro_batch=config.micro_batch,
        guidance_steps=sampler.guidance_steps,
        predictions=calls,
    )
    toy.taught = taught
    toy.adapters = dict.fromkeys(rule.needs.adapters, toy.delta.detach().clone())
    trainer = Trainer(
        rule,
        toy,
        Scorer(dict.fromkeys(config.rewards, _toy_reward), config.rewards),
        torch.optim.SGD(toy.parameters.values(), lr=0.0),
        functools.partial(config.book.draw, config.prompts.groups, config.prompts.group_size, config.seed),
        seed=config.seed,
        selector=selector(config.prompts.scouts, config.prompts.allocate, config.micro_batch),
    )
    trainer.prepare()
    before = toy.rows_forward
    trainer.update(0)
    return toy.rows_forward - before, toy.rows_backward, before


def _network(policy: DiffusersPolicy, parameters: int, trained: int, guidance: float | None) -> Network:
    """What the rows of a pipeline cost, counted on one step of it."""
    from torch.utils.flop_counter import FlopCounterMode

    example = book.fixed([{"prompt": "a"}], 1, 0)
    plan = Plan.deterministic(policy.schedule.steps)
    part = policy.rollout(example, plan)
    start = policy.rows_forward
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        policy.transition(part, 0)
    rows = policy.rows_forward - start
    calls = {bool(policy.guided(0)): rows}
    for on in (True, False):  # how many rows there are at a step of the other kind, if there is one
        step = next((k for k in range(policy.schedule.steps) if policy.guided(k) == on), None)
        if step is not None and on not in calls:
            start = policy.rows_forward
            with torch.no_grad():
                policy.transition(part, step)
            calls[on] = policy.rows_forward - start
    start = policy.rows_forward
    with policy.weights("base", guidance):
        policy.transition(part, 0)
    taught = policy.rows_forward - start
    with FlopCounterMode(display=False) as both:
        policy.transition(part, 0).prediction.sum().backward()
    with FlopCounterMode(display=False) as decode, torch.no_grad():
        policy.decode(part, part.x[-1])
    with FlopCounterMode(display=False) as decode_both:
        policy.decode(part, part.x[-1].clone().requires_grad_()).pixels.sum().backward()
    return Network(
        (calls.get(True, rows), calls.get(False, rows)),
        forward.get_total_flops() / rows,
        both.get_total_flops() / rows,
        decode.get_total_flops(),
        decode_both.get_total_flops(),
        part.x[0].numel(),
        parameters,
        trained,
        taught,
    )
