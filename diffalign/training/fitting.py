"""What a micro-batch's graph takes, for rules that choose how much of it to hold at once."""

from __future__ import annotations

import functools

import torch

from diffalign.protocols import GraphBytes, TrainablePolicy
from diffalign.rewards.scorer import Scorer
from diffalign.rules import Rule
from diffalign.runtime.memory import peak_bytes
from diffalign.types import Plan, Prompts


def fit(rule: Rule, policy: TrainablePolicy, scorer: Scorer, batch: Prompts) -> bool:
    """Tell a rule that asks for it what graphs a micro-batch holds; returns whether it did."""
    if rule.needs.graph_bytes:
        with policy.guided_throughout():
            rule.fit(graph_bytes(policy, scorer, batch), policy.schedule.steps)
    return rule.needs.graph_bytes


def graph_bytes(policy: TrainablePolicy, scorer: Scorer, prompts: Prompts) -> GraphBytes:
    """What a step, and decoder and rewards after the last, take for the gradient of one batch of prompts: allocated bytes, what runs again
    included."""
    steps = policy.schedule.steps
    part = policy.rollout(prompts, Plan.deterministic(steps))

    def term(start: int, judge: bool = False) -> None:
        x = policy.replay(part, start, steps).x
        if not judge:
            return x.sum().backward()
        media = policy.decode(part, x)
        torch.stack(
            [torch.as_tensor(reward(media, prompts)).sum() for reward in scorer.rewards.values()]
        ).sum().backward()

    parameters = [(p, p.grad) for p in policy.parameters.values()]
    try:
        term(steps - 1)  # gradients are there from now on
        one, two, judged = (
            peak_bytes(functools.partial(term, *given)) for given in ((steps - 1,), (steps - 2,), (steps - 1, True))
        )
    finally:
        for parameter, gradient in parameters:
            parameter.grad = gradient
    latent = part.x[0]
    # A step whose input carries gradient keeps more than the first one.
    step = max(two - one, 1)
    return GraphBytes(step, max(judged - one, 0), 2 * latent.numel() * latent.element_size(), max(one - step, 0))
