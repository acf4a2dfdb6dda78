"""What one update does and costs, before any weight is loaded.

Network rows come from running the rule itself once on a toy chain with the pipeline's schedule. FLOPs come from counting one
step of the pipeline's own code, built from its configs with random weights.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from diffalign.backends.diffusers import DiffusersPolicy
from diffalign.backends.toy import ToyPolicy
from diffalign.config import Config, told
from diffalign.errors import UserError, one_line
from diffalign.models import lora as adapters
from diffalign.models.untrained import random_pipeline
from diffalign.planning import architectures, remarks
from diffalign.planning.demand import Demand, demand
from diffalign.planning.facts import Facts, facts, parameters_of, toy
from diffalign.processes import Levels
from diffalign.prompts import book
from diffalign.rewards.scorer import Scorer
from diffalign.rules import Rule
from diffalign.runs import parts as build
from diffalign.runtime.randomness import Purpose, numpy_generator
from diffalign.shapes import models
from diffalign.training.fitting import fit
from diffalign.training.trainer import Trainer
from diffalign.types import Media, Plan, Prompts, Schedule


@dataclass(frozen=True)
class Cost:
    """Of one update: network rows, bytes of trajectories kept, FLOPs of the network and of decoding."""

    plan: Plan
    schedule: Schedule
    samples: int
    rows_forward: int
    rows_backward: int
    stored_bytes: int
    parameters: int
    trained: int
    flops: float
    decode_flops: float
    notes: tuple[str, ...]
    demand: Demand | None = None  # memory, where it is known

    def lines(self, rate: float, source: str) -> list[str]:
        """A report; `rate` in FLOP/s, and where it is from."""
        noisy = [k for k, on in enumerate(self.plan.noise) if on and self.schedule.std[k] > 0]
        total = self.flops + self.decode_flops
        lines = [f"note        {note}" for note in self.notes]
        lines += [
            f"sampler     {self.schedule.steps} steps to level {self.plan.stop}, noise on steps {noisy or 'none'}",
            "std         " + " ".join(f"{self.schedule.std[k]:.3f}" for k in noisy),
        ]
        for number, terms in enumerate(self.plan.updates, 1):
            lines.append(f"step {number}      {', '.join(map(str, terms))}")
        return [
            *lines,
            f"samples     {self.samples}",
            f"rows        {self.rows_forward} forward, of them {self.rows_backward} with backward",
            f"stored      {self.stored_bytes / 2**20:.1f} MiB of trajectories",
            *(self.demand.lines() if self.demand else ()),
            f"parameters  {self.parameters / 1e6:.2f} M in the denoiser, {self.trained / 1e6:.3f} M trained",
            f"flops       {_big(self.flops)} network, {_big(self.decode_flops)} decoding, per update",
            f"bound       {total / rate:.2f} s an update at {_big(rate)}FLOP/s ({source})",
        ]


@dataclass(frozen=True)
class Network:
    """What a pipeline's network costs: rows a sample and step takes (2 with guidance by two predictions); FLOPs of a row's forward,
    and of one with all that its gradient takes; of decoding a sample, without and with gradient; numbers in a latent; parameters."""

    calls: int
    row: float
    trained_row: float
    decode: float
    trained_decode: float
    latent: int
    parameters: int
    trained: int


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
    network = _network(policy, *parameters_of(adapters.denoisers(pipe), trained))
    return _cost(config, rule, policy.levels, policy.schedule, network, notes)


def _outline(config: Config, found: Facts) -> Cost:
    """The same for a model on the hub, from its architecture alone."""
    given = architectures.sizes(config)
    chain = toy(config)
    latent = int(np.prod(architectures.dimension(architectures.entry(config)["latent"], given)))
    network = Network(
        found.rows,
        found.row.forward,
        found.row.both,
        found.decode.forward,
        found.decode.both,
        latent,
        found.linear + found.other,
        found.trained,
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


def _cost(config: Config, rule: Rule, levels: Levels, schedule: Schedule, network: Network, notes: list[str]) -> Cost:
    """An update of a rule from what one row of its network costs."""
    plans = [rule.plan(schedule, k, numpy_generator(config.seed, Purpose.PLAN, k)) for k in range(20)]
    if any(other != plans[0] for other in plans):
        notes = [*notes, "the plan is drawn anew for every update; this is the first one's"]
    notes = [*told(config), *notes, *remarks.weights(config, rule), remarks.evaluations(config)]
    plan = plans[0]
    forward, backward = (network.calls * rows for rows in _rows(config, rule, levels))
    again = backward if config.checkpoint in ("spans", "both") else 0  # whole calls that run again for the gradient
    inside = backward if config.checkpoint in ("blocks", "both") else 0  # and block by block, within them
    nodes = sum(int(np.prod(plan.branch[:t])) for t in plan.levels)
    noisy = sum(int(np.prod(plan.branch[: t + 1])) for t in plan.rewalked if t < plan.stop and plan.noise[t])
    leaves = config.samples_per_update * int(np.prod(plan.branch[: plan.stop]))
    return Cost(
        plan,
        schedule,
        leaves,
        forward + again,
        backward,
        4 * network.latent * config.samples_per_update * (nodes + noisy),
        network.parameters,
        network.trained,
        network.row * (forward + again + inside - backward) + network.trained_row * backward,
        network.decode * leaves * ((plan.stop == schedule.steps) + 2 * plan.perturbed)
        + network.trained_decode * leaves * plan.pathwise,
        tuple(notes),
    )


def _toy_reward(media: Media, given: Prompts) -> torch.Tensor:
    return media.pixels.flatten(1).sum(1)


def _rows(config: Config, rule: Rule, levels: Levels) -> tuple[int, int]:
    """Rows of one update without guidance, (forward, with backward), counted on a toy chain with the same levels."""
    sampler = config.sampler
    toy = ToyPolicy(
        process=sampler.process,
        noise_level=sampler.noise_level,
        levels=levels,
        micro_batch=config.micro_batch,
    )
    entries = [{"prompt": "a"}]
    trainer = Trainer(
        rule,
        toy,
        Scorer(dict.fromkeys(config.rewards, _toy_reward), config.rewards),
        torch.optim.SGD(toy.parameters.values(), lr=0.0),
        lambda update: book.draw(entries, config.prompts.groups, config.prompts.group_size, config.seed, update),
        seed=config.seed,
    )
    trainer.update(0)
    return toy.rows_forward, toy.rows_backward


def _network(policy: DiffusersPolicy, parameters: int, trained: int) -> Network:
    """What the rows of a pipeline cost, counted on one step of it."""
    from torch.utils.flop_counter import FlopCounterMode

    example = book.fixed([{"prompt": "a"}], 1, 0)
    plan = Plan.deterministic(policy.schedule.steps)
    part = policy.rollout(example, plan)
    rows = policy.rows_forward
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        policy.transition(part, 0)
    rows = policy.rows_forward - rows
    with FlopCounterMode(display=False) as both:
        policy.transition(part, 0).prediction.sum().backward()
    with FlopCounterMode(display=False) as decode, torch.no_grad():
        policy.decode(part, part.x[-1])
    with FlopCounterMode(display=False) as decode_both:
        policy.decode(part, part.x[-1].clone().requires_grad_()).pixels.sum().backward()
    return Network(
        rows,
        forward.get_total_flops() / rows,
        both.get_total_flops() / rows,
        decode.get_total_flops(),
        decode_both.get_total_flops(),
        part.x[0].numel(),
        parameters,
        trained,
    )


# Dense bfloat16 peaks in FLOP/s from the vendor's data sheets; large products reach some 60 to 80 % of them.
CARDS = {"a100": 312e12, "h100": 989e12, "h200": 989e12, "l40s": 362e12, "rtx4090": 165e12}


def bound(card: str | None) -> tuple[float, str]:
    """A rate to hold an update against, and where it is from: a named card's peak, or what this machine does.

    Raises:
        UserError: for a card that is not in `CARDS`.
    """
    if card is None:
        return matrix_rate(), "a 1024 x 1024 product on this machine, measured now"
    if card not in CARDS:
        raise UserError(f"--card: got {card!r}, allowed are {', '.join(CARDS)}")
    return CARDS[card], f"the dense bfloat16 peak of the {card} by its data sheet"


def _big(value: float) -> str:
    """A number with G, T or P."""
    unit, sign = next(((u, s) for u, s in ((1e15, "P"), (1e12, "T")) if value >= u), (1e9, "G"))
    return f"{value / unit:.1f} {sign}"


def matrix_rate(size: int = 1024, seconds: float = 0.5) -> float:
    """FLOP/s of a float32 matrix product on this machine's default device."""
    a = torch.randn(size, size, device="cuda" if torch.cuda.is_available() else "cpu")
    a @ a
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        float((a @ a)[0, 0])
        done += 1
    return done * 2 * size**3 / (time.perf_counter() - started)
