"""Flow-DPPO: a bound on how far a step's Gaussian moves, in place of one on its ratio. Numbers are those of the list of tests."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffalign import ops
from diffalign.backends.toy import ToyPolicy
from diffalign.rules import DDPO, BranchGRPO, FlowGRPO
from diffalign.rules._trust import revisited, trusted
from diffalign.types import Credit
from tests.kit.helpers import gradient, rolled, toy_prompts

KL = {"trust": "kl", "inner_updates": 2}
MADE = {
    "flow_grpo": lambda **s: FlowGRPO(FlowGRPO.Settings(**s)),
    "branch_grpo": lambda **s: BranchGRPO(BranchGRPO.Settings(splits=[0, 1], **s)),
    "ddpo": lambda **s: DDPO(DDPO.Settings(**s)),
}


@pytest.mark.parametrize("name", MADE)
def test_5_on_the_first_pass_nothing_has_moved_and_it_is_the_unclipped_gradient(name):
    given = toy_prompts(2, 8)
    bounded = gradient(MADE[name](**KL, kl_limit=0.5), ToyPolicy(), given)
    np.testing.assert_array_equal(bounded, gradient(MADE[name](clip=1e6), ToyPolicy(), given))
    rule, policy = MADE[name](**KL), ToyPolicy()
    plan, part, credit = rolled(rule, policy)
    found = rule.loss(plan.updates[0][0], policy, part, credit, None)
    assert found.metrics["trust_kl"] == 0 and found.metrics["dropped"] == 0 and found.gap == 0


def at_a_step(shift: float, limit: float, advantage: float, at: int = 1):
    """A rollout's step after its parameters' means moved by `shift` standard deviations along the noise, and what is left of its loss."""
    rule, policy = MADE["flow_grpo"](**KL), ToyPolicy()
    _, part, credit = rolled(rule, policy)
    step = revisited(at, policy, part, Credit([np.full_like(e, advantage) for e in credit.edges]))
    noise = (part.x[at + 1] - step.now.mean[part.tree.parent[at]]) / step.now.std
    moved = (step.now.mean + shift * step.now.std * noise).detach().requires_grad_()
    log_prob = ops.gaussian.log_prob(part.x[at + 1], moved[part.tree.parent[at]], step.now.std, reduce="mean")
    step = replace(step, now=replace(step.now, mean=moved), log_ratio=log_prob - part.log_prob[at])
    value, metrics = trusted(step, part, at, limit)
    value.backward()
    return step, moved.grad, metrics


@pytest.mark.parametrize(
    ("shift", "advantage", "outwards"), [(0.1, 1, True), (0.1, -1, False), (-0.1, 1, False), (-0.1, -1, True)]
)
def test_6_of_the_four_signs_two_are_dropped_and_only_beyond_the_limit(shift, advantage, outwards):
    """Towards the noise the ratio rises: with a good sample that is outwards. D = shift^2 mean(noise^2) / 2, near 0.005."""
    step, slope, metrics = at_a_step(shift, 1e-6, advantage)
    assert ((step.log_ratio > 0) == (shift > 0)).all()
    assert metrics["dropped"] == outwards
    assert (slope == 0).all() == outwards
    assert at_a_step(shift, 10.0, advantage)[2]["dropped"] == 0


def test_7_without_a_bound_it_is_the_policy_gradient_and_at_none_only_what_comes_back_is_left():
    given = toy_prompts(2, 8)
    first = gradient(MADE["flow_grpo"](**KL, kl_limit=1e9), ToyPolicy(), given)
    np.testing.assert_array_equal(first, gradient(MADE["flow_grpo"](clip=1e6), ToyPolicy(), given))
    rule, policy = MADE["flow_grpo"](**KL, kl_limit=0.0), ToyPolicy()
    plan, part, credit = rolled(rule, policy)
    with torch.no_grad():
        policy.delta += 0.05
    term = plan.updates[1][0]
    step = revisited(term.start, policy, part, credit)
    inwards = step.advantage * step.log_ratio.detach() <= 0
    assert 0 < inwards.sum() < len(inwards)
    (expected,) = torch.autograd.grad(
        torch.where(inwards, -step.advantage * step.log_ratio.exp(), 0.0).mean(), [policy.delta]
    )
    (found,) = torch.autograd.grad(rule.loss(term, policy, part, credit, None).value, [policy.delta])
    torch.testing.assert_close(found, expected)


def test_8_the_log_ratio_has_the_mean_and_the_spread_that_the_divergence_says():
    """E log r = -D, std(log r) = sqrt(2 D / dims), over 4,000 samples; three standard errors."""
    rng = torch.Generator().manual_seed(0)
    dims, std, count = 64, 0.7, 4000
    mean, apart = torch.zeros(count, dims, dtype=torch.float64), 0.05
    noise = torch.randn(count, dims, generator=rng, dtype=torch.float64)
    x = mean + std * noise
    ratio = ops.gaussian.log_prob(x, mean + apart, std, reduce="mean") - ops.gaussian.log_prob(
        x, mean, std, reduce="mean"
    )
    d = float(ops.gaussian.divergence(mean + apart, mean, std, reduce="mean")[0])
    error = (2 * d / dims) ** 0.5 / count**0.5
    assert abs(float(ratio.mean()) + d) < 3 * error
    assert abs(float(ratio.std()) / (2 * d / dims) ** 0.5 - 1) < 3 / (2 * count) ** 0.5


def test_9_a_ratio_that_overflows_in_a_dropped_row_leaves_the_gradient_finite():
    log_ratio = torch.tensor([1e4, 0.1], dtype=torch.float64, requires_grad=True)
    value = ops.surrogate.kept(log_ratio, torch.ones(2, dtype=torch.float64), torch.tensor([False, True])).sum()
    value.backward()
    assert log_ratio.grad[0] == 0 and log_ratio.grad[1] == -torch.tensor(0.1, dtype=torch.float64).exp()


def test_a_bound_without_effect_is_a_mistake():
    assert FlowGRPO.Settings(trust="kl").problems(10) == [
        "rule.trust: got kl, has no effect without rule.inner_updates above 1: before the first of them nothing has moved"
    ]
    assert FlowGRPO.Settings(kl_limit=1e-3).problems(10) == [
        "rule.kl_limit: got 0.001, has no effect without rule.trust: kl"
    ]
    assert FlowGRPO.Settings(**KL).problems(10) == []
