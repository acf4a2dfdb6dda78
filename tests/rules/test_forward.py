"""AWM and DiffusionNFT against flow matching, each other, and their formulas."""

import numpy as np
import pytest
import torch

from diffalign.backends.toy import ToyPolicy
from diffalign.errors import UserError
from diffalign.ops import matching
from diffalign.rules import AWM, NFT
from diffalign.rules._forward import noised
from diffalign.runtime.randomness import normal
from diffalign.training.scoring import Clock
from diffalign.types import Credit, Term
from tests.kit.helpers import toy_prompts, toy_trainer

PROCESSES = ["flow_sde", "ddim"]
TERM = Term(2, 2, "forward", draw=5)


def sampled(process: str, rule, away: float = 0.1):
    """A policy away from its reference and its shadows, and a rollout."""
    policy = ToyPolicy(process=process)
    with torch.no_grad():
        policy.delta.add_(0.1)
    policy.add_shadows({"old": 0.0, "anchor": 0.0})
    with torch.no_grad():
        policy.delta.add_(away * torch.randn(policy.delta.shape, generator=torch.Generator().manual_seed(3)))
    return policy, policy.rollout(toy_prompts(2, 8), rule.plan(policy.schedule, 0, np.random.default_rng(0)))


def gradient_of(policy, value) -> np.ndarray:
    policy.delta.grad = None
    value.backward()
    return policy.delta.grad.numpy().copy()


def written_out(policy, part, delta):
    """(prediction, target, x_t, alpha, sigma, x_0) by the formulas, the network's matrix given."""
    k, x0 = TERM.start, part.x[-1]
    alpha, sigma = float(policy.schedule.alpha[k]), float(policy.schedule.sigma[k])
    n = normal([int(seed) for seed in part.prompts.seed], (3,), 18, TERM.draw, like=x0)
    x = alpha * x0 + sigma * n
    time = torch.full((len(x), 1), sigma, dtype=x.dtype)
    predicted = torch.cat([x, time, torch.ones_like(time)], 1) @ (policy.base + delta).T
    target = n - x0 if policy.schedule.prediction == "velocity" else n
    return predicted, target, x, alpha, sigma, x0


@pytest.mark.parametrize("process", PROCESSES)
def test_invariant_15_with_unit_advantages_awm_is_the_pretraining_loss(process):
    rule = AWM(AWM.Settings(weight="uniform", anchor=0.0))
    policy, part = sampled(process, rule)
    ones = Credit([np.ones(16)] * 4)
    found = gradient_of(policy, rule.loss(TERM, policy, part, ones, None).value)
    delta = policy.delta.detach().clone().requires_grad_()
    predicted, target, *_ = written_out(policy, part, delta)
    ((predicted - target) ** 2).mean().backward()
    np.testing.assert_allclose(found, delta.grad.numpy(), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("weight", ["uniform", "t", "t2", "huber", "ghuber"])
def test_invariant_15_advantages_weigh_each_samples_own_loss(process, weight):
    rule = AWM(AWM.Settings(weight=weight, anchor=0.0))
    policy, part = sampled(process, rule)
    advantage = np.linspace(-1, 1, 16)
    found = gradient_of(policy, rule.loss(TERM, policy, part, Credit([advantage] * 4), None).value)
    delta = policy.delta.detach().clone().requires_grad_()
    predicted, target, _, _, sigma, _ = written_out(policy, part, delta)
    ell = ((predicted - target) ** 2).mean(1)
    (torch.from_numpy(advantage) * matching.weighted(ell, sigma, weight)).mean().backward()
    np.testing.assert_allclose(found, delta.grad.numpy(), rtol=1e-10, atol=1e-14)


def test_anchor_and_divergence_pull_back():
    rule = AWM(AWM.Settings(anchor=2.0, kl=0.5))
    policy, part = sampled("flow_sde", rule)
    found = gradient_of(policy, rule.loss(TERM, policy, part, Credit([np.zeros(16)] * 4), None).value)
    delta = policy.delta.detach().clone().requires_grad_()
    predicted, *_ = written_out(policy, part, delta)
    anchor, *_ = written_out(policy, part, policy.shadows["anchor"]["delta"])
    base, *_ = written_out(policy, part, torch.zeros_like(delta))
    (2.0 * ((predicted - anchor) ** 2).mean() + 0.5 * ((predicted - base) ** 2).mean()).backward()
    np.testing.assert_allclose(found, delta.grad.numpy(), rtol=1e-10, atol=1e-14)


def test_awm_clips_against_the_policy_that_sampled():
    rule = AWM(AWM.Settings(weight="uniform", anchor=0.0, inner_updates=2, clip=1e-3))
    policy, part = sampled("flow_sde", rule, away=0.0)
    first = rule.loss(TERM, policy, part, Credit([np.ones(16)] * 4), None)
    assert first.gap.item() == 0
    with torch.no_grad():
        policy.delta.add_(0.3)
    later = rule.loss(TERM, policy, part, Credit([np.ones(16)] * 4), None)
    now, target, *_ = written_out(policy, part, policy.delta.detach())
    old, *_ = written_out(policy, part, policy.shadows["old"]["delta"])
    ratio = (((old - target) ** 2).mean(1) - ((now - target) ** 2).mean(1)).exp()
    expected = torch.maximum(-ratio, -ratio.clamp(1 - 1e-3, 1 + 1e-3)).mean()
    torch.testing.assert_close(later.value.detach(), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("space", ["clean", "prediction"])
@pytest.mark.parametrize("process", PROCESSES)
def test_invariant_16_nft_at_the_old_policy_is_advantage_weighted_matching(process, space):
    """(5 / b)(r L+ + (1 - r) L-) has the gradient A dL there; with r = 1/2 none."""
    rule = NFT(NFT.Settings(kl=0.0, space=space, beta=0.7))
    policy, part = sampled(process, rule, away=0.0)
    flat = gradient_of(policy, rule.loss(TERM, policy, part, Credit([np.zeros(16)] * 4), None).value)
    assert np.abs(flat).max() < 1e-15
    advantage = np.linspace(-1, 1, 16)
    found = gradient_of(policy, rule.loss(TERM, policy, part, Credit([advantage] * 4), None).value)
    delta = policy.delta.detach().clone().requires_grad_()
    predicted, target, x, alpha, sigma, x0 = written_out(policy, part, delta)
    if space == "prediction":
        errors = ((predicted - target) ** 2).mean(1)
    else:
        clean = x - sigma * predicted if process == "flow_sde" else (x - sigma * predicted) / alpha
        errors = ((clean - x0) ** 2).mean(1) / (clean - x0).detach().abs().mean(1)
    (5 * torch.from_numpy(advantage) * errors).mean().backward()
    np.testing.assert_allclose(found, delta.grad.numpy(), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_invariant_16_nft_is_linear_matching_and_a_proximal_term(beta):
    """In velocity space: const + 2 A <d, e> + 5 b |d|^2 with A in [-5, 5], d = v - v_old, e = v_old - v*; means over dims."""
    rule = NFT(NFT.Settings(kl=0.0, space="prediction", beta=beta))
    policy, part = sampled("flow_sde", rule)
    advantage = np.linspace(-1, 1, 16)
    found = gradient_of(policy, rule.loss(TERM, policy, part, Credit([advantage] * 4), None).value)
    delta = policy.delta.detach().clone().requires_grad_()
    predicted, target, *_ = written_out(policy, part, delta)
    old, *_ = written_out(policy, part, policy.shadows["old"]["delta"])
    d, e = predicted - old, old - target
    (10 * torch.from_numpy(advantage) * (d * e).mean(1) + 5 * beta * (d**2).mean(1)).mean().backward()
    np.testing.assert_allclose(found, delta.grad.numpy(), rtol=1e-9, atol=1e-13)


def test_invariant_16_all_positive_with_beta_one_is_matching_of_the_policy_itself():
    rule = NFT(NFT.Settings(kl=0.0, space="prediction", beta=1.0))
    policy, part = sampled("flow_sde", rule)
    found = gradient_of(policy, rule.loss(TERM, policy, part, Credit([np.ones(16)] * 4), None).value)
    delta = policy.delta.detach().clone().requires_grad_()
    predicted, target, *_ = written_out(policy, part, delta)
    (5 * ((predicted - target) ** 2).mean()).backward()
    np.testing.assert_allclose(found, delta.grad.numpy(), rtol=1e-10, atol=1e-14)


def test_invariant_16_clean_errors_are_t_squared_times_the_velocitys():
    at_rule = NFT(NFT.Settings(kl=0.0))
    policy, part = sampled("flow_sde", at_rule)
    at = noised(TERM, policy, part)
    predicted = at.predicted(policy).detach()
    torch.testing.assert_close(
        matching.error(at.clean(predicted), at.x0),
        at.sigma**2 * matching.error(predicted, at.target),
        rtol=1e-10,
        atol=0,
    )


def test_invariant_18_the_old_policy_samples_and_follows_once_an_update():
    rule = NFT(NFT.Settings(old_decay=0.5))
    policy = ToyPolicy()
    trainer = toy_trainer(rule, policy)
    trainer.update(0)
    assert torch.equal(policy.shadows["old"]["delta"], policy.delta.detach())  # decay 0 copies
    before, old = policy.delta.detach().clone(), policy.shadows["old"]["delta"].clone()
    with torch.no_grad():
        policy.delta.add_(1.0)
    sampled = trainer._sample(250, Clock(torch.device("cpu")))
    with torch.no_grad():
        policy.delta.copy_(before)
    expected = policy.rollout(sampled.rollout.prompts, sampled.rollout.plan)
    assert torch.equal(sampled.rollout.x[-1], expected.x[-1])  # of the old policy, not of the moved one
    trainer.update(250)
    torch.testing.assert_close(policy.shadows["old"]["delta"], 0.25 * old + 0.75 * policy.delta.detach())


def test_levels_are_drawn_without_repetition_and_pure_noise_only_if_asked_for():
    schedule = ToyPolicy(steps=8).schedule
    rng = np.random.default_rng(0)
    drawn = [[t.start for t in AWM().plan(schedule, k, rng).updates[0]] for k in range(300)]
    assert all(len(set(levels)) == 3 for levels in drawn)
    assert {level for levels in drawn for level in levels} == set(range(1, 8))
    everything = AWM(AWM.Settings(first_level=True, times=8)).plan(schedule, 0, rng).updates[0]
    assert [term.start for term in everything] == list(range(8))
    assert AWM.Settings(times=8).problems(8) == ["rule.times: got 8, allowed is up to the noise levels (7)"]


def test_pure_noise_says_nothing_to_epsilon_prediction():
    from dataclasses import replace

    schedule = replace(ToyPolicy(process="ddim").schedule, alpha=np.array([0, 0.3, 0.6, 0.9, 1.0]))
    with pytest.raises(UserError, match="epsilon says nothing about x_0 in pure noise"):
        AWM(AWM.Settings(first_level=True)).plan(schedule, 0, np.random.default_rng(0))
