"""What one update does and costs, before any weight is loaded.

Network rows come from running the rule itself once on a toy chain with the pipeline's schedule. FLOPs come from counting one
step of the pipeline's own code, built from its configs with random weights.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffalign.backends.diffusers import DiffusersPolicy
from diffalign.backends.toy import ToyPolicy, grid
from diffalign.config import Config
from diffalign.errors import UserError, one_line
from diffalign.models import lora as adapters
from diffalign.models.untrained import random_pipeline
from diffalign.planning import architectures, remarks
from diffalign.processes import PROCESSES, Levels
from diffalign.prompts import book
from diffalign.rewards.scorer import Scorer
from diffalign.rules import Rule
from diffalign.runs import parts as build
from diffalign.runtime.precision import PRECISIONS
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
    memory: dict[str, float] = field(default_factory=dict)  # bytes by what takes them, where it is known

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
        parts = ", ".join(f"{name} {taken / 2**30:.1f}" for name, taken in self.memory.items())
        memory = [f"memory      {sum(self.memory.values()) / 2**30:.1f} GiB, counted: {parts}"] if self.memory else []
        return [
            *lines,
            f"samples     {self.samples}",
            f"rows        {self.rows_forward} forward, of them {self.rows_backward} with backward",
            f"stored      {self.stored_bytes / 2**20:.1f} MiB of trajectories",
            *memory,
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


def count(config: Config) -> Cost:
    """Count one update of a config.

    Raises:
        UserError: if the model is neither embedded, nor a local folder, nor known by its architecture.
    """
    folder = models.path(config.model) or Path(config.model)
    if not folder.exists() and config.model in architectures.known():
        return _outline(config)
    if not (folder / "model_index.json").is_file():
        known = ", ".join([*models.names(), *architectures.known()])
        raise UserError(f"model: got {config.model!r}; plan reads local folders, and knows {known}")
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
    batch = book.fixed([{"prompt": "a"}], config.optimizer.micro_batch, 0)
    notes = []
    if fit(rule, policy, Scorer({"toy": _toy_reward}), batch):
        notes.append("what is auto was fitted without the reward's own graph, which a run counts")
    network = _network(policy, *_sizes(adapters.denoisers(pipe), trained))
    return _cost(config, rule, policy.levels, policy.schedule, network, notes)


def _sizes(modules: dict[str, Any], trained: dict[str, torch.Tensor]) -> tuple[int, int]:
    """Parameters of modules without the LoRA in them, and of the LoRA."""
    own = sum(p.numel() for p in trained.values())
    return sum(p.numel() for m in modules.values() for p in m.parameters()) - own, own


def _outline(config: Config) -> Cost:
    """The same for a model on the hub, from its architecture alone."""
    modules, trained = architectures.denoisers(config)
    row, decoder = architectures.row(config, next(iter(modules.values()))), architectures.decoder(config)
    sampler, given = config.sampler, architectures.sizes(config)
    kind = PROCESSES[sampler.process].kind
    toy = ToyPolicy(process=sampler.process, noise_level=sampler.noise_level, levels=grid(kind, sampler.steps))
    parameters, own = _sizes(modules, trained)
    latent = int(np.prod(architectures.dimension(architectures.known()[config.model]["latent"], given)))
    nothing = architectures.Held(0.0, 0.0)
    decode = decoder[0] if decoder else architectures.Row(0.0, 0.0, nothing, nothing)
    network = Network(
        architectures.predictions(config), row.forward, row.both, decode.forward, decode.both, latent, parameters, own
    )
    notes = ["the model is known by its architecture alone: noise levels are even ones, rewards are not counted"]
    if decoder is None:
        notes.append("its decoder is not known here and not counted")
    rule = config.make_rule()
    if rule.needs.graph_bytes:
        raise UserError("rule.memory_gib: plan cannot fit depth and span into memory without the model's folder")
    counted = _cost(config, rule, toy.levels, toy.schedule, network, notes)
    copies = 4 + len(rule.decays(0)) + (config.optimizer.ema is not None)
    memory = {
        "denoiser": counted.parameters * PRECISIONS[config.precision],
        "autoencoder": (decoder[1] if decoder else 0) * PRECISIONS[config.precision],
        "text encoders": float(architectures.known()[config.model]["encoders"]) * PRECISIONS[config.precision],
        "what is trained": 4
        * copies
        * counted.trained,  # float32: itself, its gradient, Adam's two moments, slow copies
        "graph": _graph(config, counted.plan, network.calls, row, decode),
    }
    if config.prompts.cache is not None:
        del memory["text encoders"]
    return replace(counted, memory={name: float(taken) for name, taken in memory.items() if taken})


def _graph(config: Config, plan: Plan, calls: int, row: architectures.Row, decode: architectures.Row) -> float:
    """Bytes that the largest term of a micro-batch takes at once, from what a row and the decoder take for one sample."""
    span = max(term.stop - term.start if term.through == "reward" else 1 for terms in plan.updates for term in terms)
    blocks, spans = config.checkpoint in ("blocks", "both"), config.checkpoint in ("spans", "both")
    step, last = (part.blocks if blocks else part.plain for part in (row, decode))
    kept = 0.0 if spans else step.kept  # whole calls that run again keep next to nothing
    alone = 0.0 if spans else last.kept
    if not plan.pathwise:
        last, alone = architectures.Held(0.0, 0.0), 0.0
    # Every step's graph is there while the decoder's, or the last step's, is taken a gradient of.
    most = span * kept * calls + max(calls * (step.peak - kept), last.peak, alone)
    return most * config.optimizer.micro_batch


def _cost(config: Config, rule: Rule, levels: Levels, schedule: Schedule, network: Network, notes: list[str]) -> Cost:
    """An update of a rule from what one row of its network costs."""
    plans = [rule.plan(schedule, k, numpy_generator(config.seed, Purpose.PLAN, k)) for k in range(20)]
    if any(other != plans[0] for other in plans):
        notes = [*notes, "the plan is drawn anew for every update; this is the first one's"]
    notes = [*notes, *remarks.weights(config, rule), remarks.evaluations(config)]
    plan = plans[0]
    forward, backward = (network.calls * rows for rows in _rows(config, rule, levels))
    again = backward if config.checkpoint in ("spans", "both") else 0  # whole calls that run again for the gradient
    inside = backward if config.checkpoint in ("blocks", "both") else 0  # and block by block, within them
    nodes = sum(int(np.prod(plan.branch[:t])) for t in range(plan.stop + 1))
    noisy = sum(int(np.prod(plan.branch[: t + 1])) for t in range(plan.stop) if plan.noise[t])
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
        micro_batch=config.optimizer.micro_batch,
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
