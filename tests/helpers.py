"""What several tests share."""

from __future__ import annotations

import numpy as np
import torch

from diffalign import prompts
from diffalign.backends.toy import ToyPolicy, toy_reward
from diffalign.trainer import Trainer
from diffalign.types import Prompts, UpdateRule


def toy_prompts(groups: int, group_size: int, seed: int = 0, update: int = 0) -> Prompts:
    return prompts.draw([{"prompt": "a"}], groups, group_size, seed, update)


def toy_trainer(
    rule: UpdateRule, policy: ToyPolicy, groups: int = 4, group_size: int = 8, lr: float = 0.05, micro_batch: int = 0
) -> Trainer:
    return Trainer(
        rule,
        policy,
        {"toy": toy_reward},
        {"toy": 1.0},
        torch.optim.Adam(policy.parameters.values(), lr=lr),
        lambda update: toy_prompts(groups, group_size, 0, update),
        micro_batch=micro_batch or groups * group_size,
    )


def gradient(
    rule: UpdateRule, policy: ToyPolicy, given: Prompts, micro_batch: int | None = None, update: int = 0
) -> np.ndarray:
    """The rule's gradient of the loss on some prompts, through the trainer's own path."""
    trainer = toy_trainer(rule, policy, micro_batch=micro_batch or len(given))
    trainer.draw = lambda _: given
    trainer.gradient(update)
    assert policy.delta.grad is not None
    return policy.delta.grad.numpy().copy()


TINY = [
    "prompts.groups=2",
    "prompts.group_size=2",
    "optimizer.micro_batch=4",
    "sampler.steps=3",
    "rule.window=null",
    "evaluation.images_per_prompt=1",
    "output.samples=4",
    "updates=2",
]


PATHWISE = ("truncated_bp", "rlr")


def tiny(name: str) -> list[str]:
    """The overrides that make a config as little work as possible."""
    if not any(rule in name for rule in PATHWISE):
        return TINY
    noise = ["rule.noise=[0, 1]"] if "rlr" in name else []
    return [*(o for o in TINY if "window" not in o), "rule.depth=1", *noise]


def tiny_config(run_dir, *overrides: str, name: str = "flow_grpo/shapes-sd3"):
    """A config, the quickstart's if no other is named, with as little work as possible."""
    from diffalign import config

    return config.load(name, [*tiny(name), f"run_dir={run_dir}", *overrides])
