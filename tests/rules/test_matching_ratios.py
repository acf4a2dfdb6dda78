"""Ratios from matching errors, states of the sampler's own, and norms beside the reference's."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffalign.backends.toy import ToyPolicy
from diffalign.ops import matching, norms
from diffalign.rules import AWM, NFT
from diffalign.rules._forward import noised
from diffalign.types import Credit, Term
from tests.kit.helpers import toy_trainer
from tests.rules.test_forward import PROCESSES, TERM, gradient_of, sampled, written_out

ADVANTAGE = np.linspace(-1, 1, 16)
CREDIT = Credit([ADVANTAGE] * 4)


def awm(**given):
    return AWM(AWM.Settings(**{"anchor": 0.0, "weight": "t", **given}))


@pytest.mark.parametrize("weight", ["t", "ghuber", "adaptive"])
def test_R1_on_a_first_pass_all_rows_have_one_gradient(weight):
    policy, part = sampled("flow_sde", awm())
    rules = [awm(row=row, weight=weight) for row in ("clipped", "ratio", "proximal")]
    found = [gradient_of(policy, rule.loss(TERM, policy, part, CREDIT, None).value) for rule in rules]
    assert abs(found[0]).max() > 0
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(("row", "kappa"), [("ratio", 0.0), ("proximal", 1.0), ("proximal", 0.3)])
def test_R2_R3_later_the_weight_is_held_fixed(row, kappa, process):
    """sg(r) (A - kappa sg(log r)) l, written out; attached, it would be another gradient."""
    given = {"row": row, "inner_updates": 2, **({"kappa": kappa} if row == "proximal" else {})}
    rule = awm(**given)
    policy, part = sampled(process, rule)
    found = gradient_of(policy, rule.loss(TERM, policy, part, CREDIT, None).value)
    old, delta = policy.shadows["old"]["delta"], policy.delta.detach().clone().requires_grad_()
    a = torch.from_numpy(ADVANTAGE)

    def ell(matrix):
        predicted, target, _, _, sigma, _ = written_out(policy, part, matrix)
        return sigma * ((predicted - target) ** 2).mean(1)

    log_ratio = ell(old) - ell(delta)
    fixed = log_ratio.detach().exp() * (a - kappa * log_ratio.detach())
    (fixed * ell(delta)).mean().backward()
    np.testing.assert_allclose(found, delta.grad.numpy(), rtol=1e-9, atol=1e-13)
    attached = policy.delta.detach().clone().requires_grad_()
    log_ratio = ell(old) - ell(attached)
    (-log_ratio.exp() * (a - kappa * log_ratio) * -ell(attached)).mean().backward()
    assert abs(attached.grad.numpy() - found).max() > 1e-3


@pytest.mark.parametrize("process", PROCESSES)
def test_R7_the_adaptive_weight_holds_the_size_fixed_and_is_nfts(process):
    rule = awm(weight="adaptive")
    policy, part = sampled(process, rule)
    found = gradient_of(policy, rule.loss(TERM, policy, part, CREDIT, None).value)
    delta = policy.delta.detach().clone().requires_grad_()
    predicted, _, x, alpha, sigma, x0 = written_out(policy, part, delta)
    clean = matching.clean(x, predicted, alpha, sigma, policy.schedule.prediction)
    size = (clean - x0).abs().mean(1)
    (torch.from_numpy(ADVANTAGE) * ((clean - x0) ** 2).mean(1) / size.detach()).mean().backward()
    np.testing.assert_allclose(found, delta.grad.numpy(), rtol=1e-9, atol=1e-13)
    at = noised(TERM, policy, part)
    with torch.no_grad():
        assert torch.equal(NFT()._error(at, at.predicted(policy)), -rule._log_p(at, at.predicted(policy)))


def test_R16_the_hinge_counts_long_rows_alone():
    g = torch.Generator().manual_seed(0)
    base = torch.randn(6, 4, 3, generator=g, dtype=torch.float64)
    long = base * torch.tensor([0.5, 0.9, 1.0, 1.01, 1.5, 2.0], dtype=torch.float64).view(6, 1, 1)
    long.requires_grad_()
    found = norms.excess(long, base, 0.02)
    torch.testing.assert_close(
        found, torch.tensor([0, 0, 0, 0, 0.48**2, 0.98**2], dtype=torch.float64), atol=1e-12, rtol=0
    )
    found.mean().backward()
    assert (long.grad.flatten(1).norm(dim=1) > 0).tolist() == [False] * 4 + [True] * 2
    # Of the mean norm, which is 1.15 times the reference's here, all rows would get some.
    torch.testing.assert_close(norms.ratio(base, base), torch.ones(6, dtype=torch.float64))
    assert norms.radial(base, base).abs().max() == 0


def test_R17_lengths_split_into_radial_and_tangential_parts():
    g = torch.Generator().manual_seed(1)
    own, base = (torch.randn(5, 7, generator=g, dtype=torch.float64) for _ in range(2))
    along = ((own - base) * base).sum(1, keepdim=True) / (base**2).sum(1, keepdim=True) * base
    across = (own - base - along).norm(dim=1) / base.norm(dim=1)
    torch.testing.assert_close(
        norms.ratio(own, base) ** 2, (1 + norms.radial(own, base)) ** 2 + across**2, rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("kind", [AWM, NFT])
def test_R16_norms_are_logged_where_a_reference_is_asked_and_held_where_that_is_wished(kind):
    def of(**given):
        rule = kind(kind.Settings(**given))
        policy, part = sampled("flow_sde", rule)
        loss = rule.loss(TERM, policy, part, CREDIT, None)
        return gradient_of(policy, loss.value), loss.metrics, rule.needs.reference

    plain, logged, asked = of(kl=0.0)
    assert "norm_ratio" not in logged and not asked
    _, logged, asked = of(kl=0.5)
    assert {"norm_ratio", "norm_radial", "kl"} <= logged.keys() and asked
    held, logged, asked = of(kl=0.0, norm=10.0, norm_slack=0.0)
    assert "kl" not in logged and asked
    assert abs(held - plain).max() > 1e-6
    free, *_ = of(kl=0.0, norm=10.0, norm_slack=5.0)
    np.testing.assert_allclose(free, plain, atol=1e-15)  # nothing is so long


@pytest.mark.parametrize("process", PROCESSES)
def test_R20_own_states_are_the_stored_ones_and_their_noise_leads_there(process):
    rule = awm(states="own", times=3)
    policy, part = sampled(process, rule)
    for term in part.plan.updates[0]:
        at = noised(term, policy, part)
        assert at.x is part.x[term.start] and at.x.numel()
        torch.testing.assert_close(at.alpha * at.x0 + at.sigma * at.noise, at.x, rtol=1e-12, atol=1e-12)
    unread = rule.plan(policy.schedule, 0, np.random.default_rng(0)).levels
    assert unread == {4, *(term.start for term in part.plan.updates[0])}


def test_R19_a_perfectly_straight_student_learns_nothing_from_its_own_states():
    """Its clean prediction on its way is where it ends: v = x_1 - x_0 everywhere, so target and prediction are equal."""
    g = torch.Generator().manual_seed(0)
    x0, x1 = (torch.randn(8, 3, generator=g, dtype=torch.float64) for _ in range(2))
    alpha, sigma = 0.6, 0.4
    x = alpha * x0 + sigma * x1
    noise = (x - alpha * x0) / sigma
    assert (matching.target(x0, noise, alpha, sigma, "velocity") - (x1 - x0)).abs().max() < 1e-12


def test_R24_a_slow_policy_samples_and_is_what_ratios_are_against():
    rule = awm(old_decay=0.5)
    assert sampled("flow_sde", awm())[1].plan.sampled_by == ""
    policy, part = sampled("flow_sde", rule)
    assert part.plan.sampled_by == "old"
    assert rule.decays(100) == {"old": 0.1} and rule.decays(10_000) == {"old": 0.5}
    loss = rule.loss(TERM, policy, part, CREDIT, None)
    assert loss.gap is None
    now, old = policy.delta.detach(), policy.shadows["old"]["delta"]
    (a, target, *_), (b, *_) = (written_out(policy, part, matrix) for matrix in (now, old))
    sigma = float(policy.schedule.sigma[TERM.start])
    ratio = (sigma * (((b - target) ** 2).mean(1) - ((a - target) ** 2).mean(1))).exp()
    worth = torch.from_numpy(ADVANTAGE)
    expected = torch.maximum(-worth * ratio, -worth * ratio.clamp(0, 2)).mean()
    torch.testing.assert_close(loss.value.detach(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "given",
    [
        {"row": "proximal", "weight": "adaptive", "old_decay": 0.5, "scale": "none"},
        {"states": "own"},
        {"row": "ratio"},
        {"weight": "elbo"},
    ],
)
def test_the_reward_goes_up(given):
    trainer = toy_trainer(AWM(AWM.Settings(times=2, **given)), ToyPolicy())
    first = np.mean([trainer.update(k).metrics["reward/total"] for k in range(3)])
    for k in range(3, 60):
        last = trainer.update(k).metrics["reward/total"]
    assert last > first


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"kappa": 2.0}, "rule.kappa"),
        ({"anchor_to": "old"}, "rule.anchor_to: got old, has no effect without rule.inner_updates above 1 or rule.old"),
        (
            {"anchor_to": "old", "old_decay": 0.5, "anchor": 0.0},
            "rule.anchor_to: got old, has no effect without rule.anchor",
        ),
        (
            {"anchor_to": "old", "old_decay": 0.5, "anchor_decay": 0.5},
            "rule.anchor_decay: got 0.5, has no effect without",
        ),
        (
            {"anchor_to": "old", "old_decay": 0.5, "implicit": "group", "implicit_to": "anchor"},
            "and rule.anchor_to: anchor",
        ),
        ({"row": "advantage", "ratio_over": "sample", "old_decay": 0.5}, "rule.ratio_over: got sample, has no effect"),
        ({"norm_slack": 0.1}, "rule.norm_slack"),
        ({"states": "own", "shared_noise": True}, "rule.shared_noise: got it with rule.states: own"),
        ({"states": "own", "spread": "antithetic"}, "rule.spread: antithetic: got it with rule.states: own"),
    ],
)
def test_R25_what_has_no_effect_is_refused(given, told):
    assert any(told in line for line in AWM.Settings(**given).problems(10))


def test_a_term_at_stored_states_says_so():
    assert str(replace(Term(2, 2, "forward"), stored=True)) == "forward[2,2) as sampled x 1"


@pytest.mark.parametrize("anchor_to", ["old", "anchor"])
def test_R15_an_anchor_above_one_bounds_the_loss_from_below(anchor_to):
    """-|v - v*|^2 + anchor |v - v_slow|^2 is convex in v above 1 and falls for ever below it."""
    direction = torch.randn(3, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64)

    def along(anchor: float) -> list[float]:
        given = {"row": "advantage", "weight": "uniform", "anchor": anchor, "anchor_to": anchor_to, "old_decay": 0.5}
        rule = AWM(AWM.Settings(**given))
        policy, part = sampled("flow_sde", rule, away=0.0)
        losses = []
        for far in (1e2, 1e3, 1e4):
            with torch.no_grad():
                policy.delta.copy_(policy.shadows["old"]["delta"] + far * direction)
                losses.append(float(rule.loss(TERM, policy, part, Credit([-np.ones(16)] * 4), None).value))
        return losses

    assert along(1.1) == sorted(along(1.1))
    assert along(0.9) == sorted(along(0.9), reverse=True)


def test_R15_the_pull_to_old_is_to_the_policy_that_samples():
    rule = awm(row="advantage", weight="uniform", anchor=1.1, anchor_to="old", old_decay=0.5)
    assert rule.decays(100) == {"old": 0.1}  # no other copy is kept
    policy, part = sampled("flow_sde", rule)
    del policy.shadows["anchor"]
    found = gradient_of(policy, rule.loss(TERM, policy, part, CREDIT, None).value)
    old, delta = policy.shadows["old"]["delta"], policy.delta.detach().clone().requires_grad_()
    predicted, target, *_ = written_out(policy, part, delta)
    slow, *_ = written_out(policy, part, old)
    ell, drift = ((predicted - target) ** 2).mean(1), ((predicted - slow) ** 2).mean(1)
    (torch.from_numpy(ADVANTAGE) * ell + 1.1 * drift).mean().backward()
    np.testing.assert_allclose(found, delta.grad.numpy(), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_R13_centred_at_the_reference_it_regresses_to_reinforced_predictions(kl, process):
    """limit beta |v - (v_ref + A (v* - v_old) / beta)|^2, and kl |v - v_ref|^2 on top of it."""
    beta = 0.7
    rule = NFT(NFT.Settings(centre="reference", space="prediction", beta=beta, kl=kl))
    assert rule.needs.reference and not NFT(NFT.Settings(kl=0.0)).needs.reference
    policy, part = sampled(process, rule)
    found = gradient_of(policy, rule.loss(TERM, policy, part, CREDIT, None).value)
    delta = policy.delta.detach().clone().requires_grad_()
    predicted, target, *_ = written_out(policy, part, delta)
    old, *_ = written_out(policy, part, policy.shadows["old"]["delta"])
    base, *_ = written_out(policy, part, torch.zeros_like(delta))
    wanted = base + torch.from_numpy(ADVANTAGE)[:, None] * (target - old) / beta
    (5 * beta * ((predicted - wanted) ** 2).mean() + kl * ((predicted - base) ** 2).mean()).backward()
    np.testing.assert_allclose(found, delta.grad.numpy(), rtol=1e-10, atol=1e-14)
    other = NFT(NFT.Settings(space="prediction", beta=beta, kl=kl))
    assert abs(gradient_of(policy, other.loss(TERM, policy, part, CREDIT, None).value) - found).max() > 1e-3


def test_the_references_prediction_is_asked_once():
    rule = NFT(NFT.Settings(centre="reference", kl=0.3))
    policy, part = sampled("flow_sde", rule)
    before = policy.rows_forward
    rule.loss(TERM, policy, part, CREDIT, None)
    assert policy.rows_forward - before == 3 * 16  # its own, the old one's, the reference's


@pytest.mark.parametrize("weight", ["uniform", "huber", "adaptive", "elbo"])
def test_a_power_is_of_ghuber_alone(weight):
    problems = AWM.Settings(weight=weight, power=0.5).problems(10)
    assert "rule.power: got 0.5, has no effect without rule.weight: ghuber" in problems
    assert not AWM.Settings(power=0.5).problems(10)
