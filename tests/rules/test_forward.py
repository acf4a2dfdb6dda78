"""AWM and DiffusionNFT against flow matching, each other, and their formulas."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffalign.backends.toy import ToyPolicy
from diffalign.errors import UserError
from diffalign.ops import matching
from diffalign.rules import AWM, NFT, _forward
from diffalign.rules._forward import noised
from diffalign.runtime.randomness import normal
from diffalign.training.scoring import Clock
from diffalign.types import Credit, Term
from tests.kit.helpers import gradient, toy_prompts, toy_trainer

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
    schedule = replace(ToyPolicy(process="ddim").schedule, alpha=np.array([0, 0.3, 0.6, 0.9, 1.0]))
    with pytest.raises(UserError, match="epsilon says nothing about x_0 in pure noise"):
        AWM(AWM.Settings(first_level=True)).plan(schedule, 0, np.random.default_rng(0))


# -- how levels and noises are spread


def planned(steps, seed, **settings):
    """The terms of one optimiser step."""
    return (
        AWM(AWM.Settings(**settings)).plan(ToyPolicy(steps=steps).schedule, 0, np.random.default_rng(seed)).updates[0]
    )


def test_70_R10_strata_draw_one_level_of_each_part_and_are_unbiased():
    value = np.arange(9.0) ** 2  # of a loss, by level; 0 is pure noise and not drawn
    parts = [range(1, 4), range(4, 7), range(7, 9)]  # of 8 levels: 3, 3, 2
    found = []
    for seed in range(1000):
        terms = planned(9, seed, spread="strata")
        for term, part in zip(terms, parts, strict=True):
            assert term.start in part
            assert term.weight == pytest.approx(len(part) / 8)
        found.append(sum(term.weight * value[term.start] for term in terms))
    z = (np.mean(found) - value[1:].mean()) / (np.std(found) / np.sqrt(len(found)))
    assert abs(z) < 3.5  # once in 2,000 seeds by chance
    equal = [sum(value[term.start] for term in planned(9, seed, spread="strata")) / 3 for seed in range(1000)]
    assert abs(np.mean(equal) - value[1:].mean()) > 10 * np.std(equal) / np.sqrt(len(equal))  # parts' sizes matter


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("shared", [False, True])
def test_71_antithetic_draws_cancel_what_is_odd_in_the_noise(process, shared):
    """What is left of a pair's gradient is the part that is even in n, and nothing else: of a linear network, by hand."""
    rule = AWM(AWM.Settings(weight="uniform", anchor=0.0, times=2, spread="antithetic", shared_noise=shared))
    policy, part = sampled(process, rule)
    (first, turned, *others) = rule.plan(policy.schedule, 0, np.random.default_rng(1)).updates[0]
    assert (turned.mirrored, first.mirrored) == (True, False)
    assert turned == replace(first, mirrored=True)
    assert len(others) == 2
    assert sum(term.weight for term in (first, turned, *others)) == 1
    one, other = (noised(term, policy, part, shared) for term in (first, turned))
    assert torch.equal(one.noise + other.noise, torch.zeros_like(one.noise))  # exactly
    assert len(torch.unique(one.noise, dim=0)) == (2 if shared else 16)
    torch.testing.assert_close((one.x + other.x) / 2, one.alpha * part.x[-1], rtol=1e-14, atol=1e-15)
    ones = Credit([np.ones(16)] * 4)
    pair = [gradient_of(policy, rule.loss(term, policy, part, ones, None).value) for term in (first, turned)]

    # |M (a + s n) - (b + c n)|^2 with a, b of x_0 and t alone: the terms <M a - b, (M s - c) n> are odd
    delta = policy.delta.detach().clone().requires_grad_()
    x0, n, sigma = part.x[-1], one.noise, one.sigma
    fixed = torch.cat(
        [one.alpha * x0, torch.full((16, 1), sigma, dtype=x0.dtype), torch.ones(16, 1, dtype=x0.dtype)], 1
    )
    moving = torch.cat([sigma * n, torch.zeros(16, 2, dtype=x0.dtype)], 1)
    still = -x0 if policy.schedule.prediction == "velocity" else 0 * x0
    matrix = policy.base + delta
    ((fixed @ matrix.T - still) ** 2 + (moving @ matrix.T - n) ** 2).mean().backward()
    np.testing.assert_allclose(sum(pair) / 2, delta.grad.numpy(), rtol=1e-10, atol=1e-14)
    assert np.abs(pair[0] - pair[1]).max() > 1e-3  # each has odd parts


@pytest.mark.parametrize("asked", [{}, {"spread": "random"}])
@pytest.mark.parametrize("rule", [AWM, NFT])
def test_72_random_is_what_it_was_before_there_was_a_choice(rule, asked):
    schedule = ToyPolicy(steps=9).schedule
    for seed in range(20):
        found = rule(rule.Settings(**asked)).plan(schedule, 0, np.random.default_rng(seed)).updates
        rng = np.random.default_rng(seed)
        levels = sorted(rng.choice(np.arange(1, 9), 3, replace=False))
        assert found == (tuple(Term(k, k, "forward", 1 / 3, draw=int(rng.integers(1, 2**62))) for k in levels),)


def test_R9_a_shared_noise_is_the_groups_whatever_the_micro_batch(monkeypatch):
    """Two processes: tests/runtime/test_distributed.py, whose micro-batches cut groups."""
    rule = AWM(AWM.Settings(shared_noise=True, times=2))
    policy, part = sampled("flow_sde", rule)
    equal = replace(part, x=[*part.x[:-1], part.x[-1][:1].expand(16, 3)])
    x = noised(TERM, policy, equal, shared=True).x
    assert len(torch.unique(x, dim=0)) == 2  # equal samples of a group are at one x_t
    assert len(torch.unique(noised(TERM, policy, equal).x, dim=0)) == 16

    def gradients() -> list[np.ndarray]:
        return [gradient(rule, ToyPolicy(), toy_prompts(2, 8), micro_batch) for micro_batch in (16, 4, 3, 2)]

    whole, *others = gradients()
    for other in others:
        np.testing.assert_allclose(other, whole, rtol=1e-9, atol=1e-13)
    right = _forward.normal
    monkeypatch.setattr(
        _forward, "normal", lambda seeds, *given, **more: right([seeds[0]] * len(seeds), *given, **more)
    )
    whole, *others = gradients()  # with the noise of whatever a micro-batch begins with
    assert all(abs(other - whole).max() > 1e-3 * abs(whole).max() for other in others)
