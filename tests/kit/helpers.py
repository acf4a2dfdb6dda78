"""What several tests share."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from diffalign.backends.toy import WEIGHT, ToyPolicy, toy_reward
from diffalign.prompts import book
from diffalign.rewards.scorer import Scorer
from diffalign.rules import RULES, Rule
from diffalign.runs import state as states
from diffalign.runs.store import Store
from diffalign.runtime.distributed import ALONE
from diffalign.training.backward import Share
from diffalign.training.sampled import Sampled, settled
from diffalign.training.scoring import Clock
from diffalign.training.trainer import Trainer
from diffalign.types import Credit, Plan, Prompts, Rollout


def toy_prompts(groups: int, group_size: int, seed: int = 0, update: int = 0) -> Prompts:
    return book.draw([{"prompt": "a"}], groups, group_size, seed, update)


def toy_teacher(policy: ToyPolicy, size: float = 0.5) -> torch.Tensor:
    """A delta whose samples have a higher reward: less is predicted, and so more is left, of what the reward likes."""
    delta = torch.zeros_like(policy.delta)
    delta[..., -1] = -size * delta.new_tensor(np.resize(np.sign(WEIGHT), policy.dim))
    return delta


def toy_trainer(
    rule: Rule, policy: ToyPolicy, groups: int = 4, group_size: int = 8, lr: float = 0.05, micro_batch: int = 0
) -> Trainer:
    policy.micro_batch = micro_batch or groups * group_size
    for name in rule.needs.adapters:
        policy.adapters.setdefault(name, toy_teacher(policy))
    return Trainer(
        rule,
        policy,
        Scorer({"toy": toy_reward}),
        torch.optim.Adam(policy.parameters.values(), lr=lr),
        lambda update: toy_prompts(groups, group_size, 0, update),
    )


def shares_of(trainer: Trainer, sampled: Sampled, number: int = 0) -> list[Share]:
    """What an optimiser step is about."""
    return settled(sampled, number, trainer.backward, ALONE, print)


def gradient(
    rule: Rule, policy: ToyPolicy, given: Prompts, micro_batch: int | None = None, update: int = 0
) -> np.ndarray:
    """The rule's gradient of the loss on some prompts, through the trainer's own path."""
    trainer = toy_trainer(rule, policy, micro_batch=micro_batch or len(given))
    trainer.draw = lambda _: given
    trainer.gradient(update)
    assert policy.delta.grad is not None
    return policy.delta.grad.numpy().copy()


def rolled(rule: Rule, policy: ToyPolicy, groups: int = 2, size: int = 8) -> tuple[Plan, Rollout, Credit | None]:
    """A rule's first plan, a rollout of it, and its credit."""
    given = toy_prompts(groups, size)
    plan = replace(rule.plan(policy.schedule, 0, np.random.default_rng(0)), keep_noise=True)  # for tests to read
    part = policy.rollout(given, plan)
    scores = toy_trainer(rule, policy, groups, size).sampling.score(part, Clock(torch.device("cpu")))
    return plan, part, rule.credit(part.tree, scores, given)


def checkpoints(run: Path) -> list[Path]:
    """A run's whole checkpoints, oldest first."""
    return Store(run / "checkpoints").complete()


def saved_state(checkpoint: Path) -> states.RunState:
    return states.load(Store(checkpoint.parent), checkpoint)


SMALL = [
    "prompts.groups=2",
    "prompts.group_size=2",
    "optimizer.micro_batch=4",
    "sampler.steps=3",
    "evaluation.images_per_prompt=1",
    "output.samples=4",
    "updates=2",
]
# What of a rule's settings must change for three steps; nothing for others.
THREE_STEPS = {
    "flow_grpo": ["rule.window=null"],
    "grpo_guard": ["rule.window=null"],
    "branch_grpo": ["rule.window=null", "rule.splits=[0, 1]"],
    "ddpo": ["rule.window=null"],
    "truncated_bp": ["rule.depth=1"],
    "rlr": ["rule.depth=1", "rule.noise=[0, 1]"],
    "awm": ["rule.times=2"],
    "nft": ["rule.times=2"],
    "distil": ["rule.times=2", 'rule.teachers={"*": base}', "rule.teacher_guidance=2"],
}
TINY = [*SMALL, *THREE_STEPS["flow_grpo"]]


def tiny(name: str) -> list[str]:
    """The overrides that make a config, or a command with its name, as little work as possible."""
    rules = [rule for rule in re.findall(r"\w+", name) if rule in RULES]
    return [*SMALL, *THREE_STEPS.get(rules[0] if rules else "flow_grpo", [])]


def tiny_config(run_dir, *overrides: str, name: str = "flow_grpo/shapes-sd3"):
    """A config, the quickstart's if no other is named, with as little work as possible."""
    from diffalign import config

    return config.load(name, [*tiny(name), f"run_dir={run_dir}", *overrides])


def comfyui(place, out) -> dict[Path, int]:
    """An adapter's export for ComfyUI: the files, and how many layers each has."""
    from diffalign.models import exporting
    from diffalign.models.places import given

    return {made.path: made.layers for made in exporting.export([given(str(place), "export")], out)}
