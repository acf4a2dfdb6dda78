"""What a micro-batch's graph takes, for rules that choose how much of it to hold at once."""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.protocols import GraphBytes, TrainablePolicy
from diffalign.rewards.scorer import Scorer
from diffalign.rules import Rule
from diffalign.runtime.memory import saved_bytes
from diffalign.types import Plan, Prompts


def fit(rule: Rule, policy: TrainablePolicy, scorer: Scorer, batch: Prompts) -> bool:
    """Tell a rule that asks for it what graphs a micro-batch holds; returns whether it did."""
    if rule.needs.graph_bytes:
        rule.fit(graph_bytes(policy, scorer, batch), policy.schedule.steps)
    return rule.needs.graph_bytes


def graph_bytes(policy: TrainablePolicy, scorer: Scorer, prompts: Prompts) -> GraphBytes:
    """What the last step, and decoder and rewards after it, keep for the gradient of one batch of prompts."""
    steps = policy.schedule.steps
    part = policy.rollout(prompts, Plan.deterministic(steps))

    def judged() -> Tensor:
        media = policy.decode(part, policy.replay(part, steps - 1, steps).x)
        return torch.stack([torch.as_tensor(reward(media, prompts)).sum() for reward in scorer.rewards.values()])

    one = saved_bytes(lambda: policy.replay(part, steps - 1, steps))
    two = saved_bytes(lambda: policy.replay(part, steps - 2, steps))
    latent = part.x[0]
    # A step whose input carries gradient keeps more than the first one.
    return GraphBytes(two - one, saved_bytes(judged) - one, 2 * latent.numel() * latent.element_size())
