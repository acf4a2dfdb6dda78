"""FlowBP on both embedded pipelines: the reward's slope at the finished latent, handed to one network call at a time."""

from __future__ import annotations

import pytest
import torch

from diffalign.rules import TruncatedBP
from diffalign.rules import _slope as slopes
from diffalign.runtime import memory
from diffalign.runtime.randomness import Purpose, numpy_generator
from diffalign.types import Plan
from tests.backends.test_both_pipelines import (
    DTYPE,
    both,
    brightness,
    full_backpropagation,
    given,
    gradient_peak,
    laboratory,
    make,
    relative,
    trainer_of,
)

S = TruncatedBP.Settings


def gradients(policy, rule: TruncatedBP, update: int = 0) -> dict[str, torch.Tensor]:
    """Through the trainer's own path, of the pictures' brightness."""
    trainer = trainer_of(rule, policy)
    trainer.draw = lambda _: given()
    trainer.gradient(update)
    return {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in policy.parameters.items()}


@both
@pytest.mark.parametrize(("guidance", "checkpoint"), [(3.0, "none"), (1.0, "both")])
def test_41_a_bridge_over_two_steps_is_full_backpropagation_through_diffusers_own_loop(name, guidance, checkpoint):
    policy = make(name, 2, guidance, DTYPE[name], checkpoint=checkpoint)
    rule = TruncatedBP(S(connect="bridge", depth="all", gamma=1.0))
    update = next(
        u for u in range(100) if slopes.bridged(rule.plan(policy.schedule, u, numpy_generator(0, Purpose.PLAN, u))) == 1
    )
    expected = full_backpropagation(name, 2, guidance)
    assert relative(gradients(policy, rule, update), expected) < 1e-6  # float64, or float32 where the pipeline insists
    leaps = TruncatedBP(S(connect="lagrange", depth="all", gamma=1.0))  # over one step each
    assert relative(gradients(policy, leaps), expected) < 1e-6
    assert relative(gradients(policy, TruncatedBP(S(connect="sparse", depth="all"))), expected) > 1e-3


@both
@pytest.mark.slow
def test_44_what_a_gradient_holds_depends_neither_on_the_steps_nor_on_how_many_are_drawn(name):
    """By allocated bytes: the larger of decoder with reward and one network call."""
    found = {}
    for connect in ("sparse", "bridge"):
        few, many = (
            gradient_peak(laboratory(name, TruncatedBP(S(connect=connect, depth="all", trained=trained)), steps))
            for steps, trained in ((4, 2), (12, 8))
        )
        assert many == pytest.approx(few, rel=0.03)  # 1 % was measured; a chain grows by a fifth of it a step
        found[connect] = few
    first = found["sparse"]
    assert found["bridge"] < 1.1 * first  # the gradient to the network's input besides
    chain = TruncatedBP(S(depth="all", detached=True, trained=2))
    assert first < 0.8 * gradient_peak(laboratory(name, chain, 4))

    policy = make(name, 4)
    part = policy.rollout(given(2), Plan.deterministic(4))

    def decoder():
        brightness(policy.decode(part, part.x[4].requires_grad_()).pixels).sum().backward()

    def call():
        policy.replay(part, 2, 3).x.sum().backward()

    call()  # parameters have their gradients now
    most = max(memory.peak_bytes(decoder), memory.peak_bytes(call))
    assert first <= 1.1 * most + 4 * sum(p.numel() for p in policy.parameters.values())
