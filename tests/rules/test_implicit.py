"""Group losses on implicit rewards: DGPO, centred regression, listwise; numbers are the ones of the list of what each must hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffalign import ops
from diffalign.backends.toy import ToyPolicy
from diffalign.ops import implicit
from diffalign.rules import _forward as forward
from diffalign.rules.awm import AWM
from diffalign.training.scoring import Clock
from tests.kit.helpers import gradient, toy_prompts, toy_trainer

FORMS = ("group", "residual", "listwise")
GROUP = np.repeat([0, 1], 4)
VALID = np.ones(8, bool)
RNG = np.random.default_rng(0)
A, R = RNG.normal(size=8), 0.3 * RNG.normal(size=8)
TIGHT = 1e-12  # float64 sums in another order


def rule(**given) -> AWM:
    """AWM with errors as they are, no clipping in reach, and no anchor: the bare loss."""
    return AWM(AWM.Settings(**{"weight": "uniform", "clip": 1e6, "anchor": 0.0, **given}))


def weights(form: str, a=A, r=R, group=GROUP, valid=VALID, beta=2.0):
    return {"group": implicit.group_gate, "residual": implicit.residual, "listwise": implicit.listwise}[form](
        a, r, group, valid, beta
    )


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_the_gradient_of_the_loss_that_is_named(form):
    """u_i = d loss / d l_i with R = l_ref - l, by automatic differentiation; losses averaged over two groups of four."""
    ell = torch.tensor(-R, requires_grad=True)
    a = torch.tensor(A).reshape(2, 4)
    a = a - a.mean(1, keepdim=True)
    r, beta = -ell.reshape(2, 4), 2.0
    loss = {
        "group": lambda: -torch.nn.functional.logsigmoid(beta * (a * r).mean(1)).mean() / beta,
        "residual": lambda: ((beta * (r - r.mean(1, keepdim=True)) - a) ** 2).mean() / (2 * beta),
        "listwise": lambda: -(a.softmax(1) * (beta * r).log_softmax(1)).sum(1).mean() / beta,
    }[form]()
    (slope,) = torch.autograd.grad(loss, ell)
    np.testing.assert_allclose(weights(form) / 8, slope.numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_29_34_what_is_alike_for_a_group_changes_nothing(form):
    shift = np.where(GROUP == 0, 7.0, 0.0)
    np.testing.assert_allclose(weights(form, r=R + shift), weights(form), atol=1e-12)
    np.testing.assert_allclose(weights(form, a=A + shift), weights(form), atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_rows_without_a_score_weigh_nothing_and_change_no_other(form):
    valid = VALID.copy()
    valid[1] = False
    found, other = (
        weights(form, valid=valid),
        weights(form, a=np.where(valid, A, 9.0), r=np.where(valid, R, 9.0), valid=valid),
    )
    assert found[1] == 0
    np.testing.assert_array_equal(found, other)
    assert abs(found[GROUP == 0].sum()) < 1e-12


def test_28_a_pair_is_diffusion_dpo():
    """-log sigmoid(b (R_w - R_l)) has 2 b times the gradient of the pair's mean: both losses by hand."""
    ell = torch.tensor([0.4, 0.1], dtype=torch.float64, requires_grad=True)
    b = 3.0
    (slope,) = torch.autograd.grad(-torch.nn.functional.logsigmoid(b * (ell[1] - ell[0])), ell)
    found = implicit.group_gate(np.array([1.0, -1.0]), -ell.detach().numpy(), np.zeros(2, int), np.ones(2, bool), 2 * b)
    np.testing.assert_allclose(2 * b * found / 2, slope.numpy(), rtol=1e-12)


def test_30_the_gate_closes_on_a_group_in_order_and_is_open_on_one_in_reverse():
    order = np.array([1.0, 0.5, -0.5, -1.0])
    group, valid = np.zeros(4, int), np.ones(4, bool)
    np.testing.assert_array_equal(implicit.group_gate(order, order, group, valid, 1e6), 0)
    np.testing.assert_array_equal(implicit.group_gate(order, -order, group, valid, 1e6), order)


def moved(policy: ToyPolicy) -> ToyPolicy:
    """Away from the reference, so that implicit rewards are not 0."""
    with torch.no_grad():
        policy.delta += 0.3 * torch.randn(
            policy.delta.shape, generator=torch.Generator().manual_seed(1), dtype=policy.delta.dtype
        )
    return policy


@pytest.mark.parametrize(("form", "factor"), [("group", 0.5), ("residual", 1.0)])
def test_26_31_at_the_reference_it_is_the_weighted_loss(form, factor):
    given = toy_prompts(3, 4)
    found = gradient(rule(implicit=form), ToyPolicy(), given, micro_batch=4)
    np.testing.assert_allclose(found, factor * gradient(rule(), ToyPolicy(), given), rtol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_27_the_cut_into_micro_batches_changes_nothing(form):
    given = toy_prompts(3, 4)
    settings = {"implicit": form, "implicit_beta": 20.0}
    found = [gradient(rule(**settings), moved(ToyPolicy()), given, micro_batch=m) for m in (12, 5, 2)]
    assert np.abs(found[0] - gradient(rule(), moved(ToyPolicy()), given)).max() > 1e-4  # it is another gradient
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-9, atol=TIGHT)


@pytest.mark.parametrize("form", FORMS)
def test_32_the_gradient_is_that_of_the_whole_groups_loss(form):
    """Against one pass over all samples with automatic differentiation through every implicit reward, nothing held constant."""
    policy, own = moved(ToyPolicy()), rule(implicit=form, implicit_beta=20.0, times=1)
    trainer = toy_trainer(own, policy, 3, 4)
    sampled = trainer._sample(0, Clock(torch.device("cpu")))
    (term,) = sampled.rollout.plan.updates[0]
    at = forward.noised(term, policy, sampled.rollout)
    ell = ops.matching.error(at.predicted(policy), at.target)
    with policy.reference():
        base = ops.matching.error(at.predicted(policy), at.target)
    r = (base - ell).reshape(3, 4)
    a = torch.as_tensor(sampled.credit.edges[-1] * own.settings.advantage_limit).reshape(3, 4)
    a, beta = a - a.mean(1, keepdim=True), 20.0
    loss = {
        "group": lambda: -torch.nn.functional.logsigmoid(beta * (a * r).mean(1)).mean() / beta,
        "residual": lambda: ((beta * (r - r.mean(1, keepdim=True)) - a) ** 2).mean() / (2 * beta),
        "listwise": lambda: -(a.softmax(1) * (beta * r).log_softmax(1)).sum(1).mean() / beta,
    }[form]()
    (slope,) = torch.autograd.grad(loss / own.settings.advantage_limit, [policy.delta])
    trainer.gradient(0)
    np.testing.assert_allclose(policy.delta.grad.numpy(), slope.numpy(), rtol=1e-8, atol=TIGHT)


def test_33_the_residual_vanishes_where_the_density_is_the_wanted_one():
    """At R = A / beta + a constant nothing is left to learn, where the weighted loss still pushes."""
    for beta in (0.5, 4.0):
        np.testing.assert_allclose(weights("residual", r=A / beta + 3.0, beta=beta), 0, atol=1e-12)
    np.testing.assert_allclose(weights("listwise", r=A / 4.0 + 3.0, beta=4.0), 0, atol=1e-12)


def test_a_shared_noise_is_one_a_group():
    policy, given = ToyPolicy(), toy_prompts(2, 3)
    part = policy.rollout(given, rule().plan(policy.schedule, 0, np.random.default_rng(0)))
    (term, *_) = part.plan.updates[0]
    noise = forward.noised(term, policy, part, shared=True).noise
    assert (noise[0] == noise[1]).all() and (noise[0] != noise[3]).any()
    own = forward.noised(term, policy, part).noise
    assert (own[0] != own[1]).any()


def test_levels_bound_where_samples_are_noised_to():
    schedule = ToyPolicy(steps=10).schedule
    for levels, first, expected in (
        ((0, 4), False, {1, 2, 3}),
        ((0, 4), True, {0, 1, 2, 3}),
        ((6, 10), False, {6, 7, 8, 9}),
    ):
        own = rule(levels=levels, first_level=first, times=2)
        seen = {t.start for k in range(60) for t in own.plan(schedule, k, np.random.default_rng(k)).updates[0]}
        assert seen == expected
    assert AWM.Settings(levels=(3, 3)).problems(10) == [
        "rule.levels: got [3, 3], allowed is 0 <= first < stop <= sampler.steps (10)"
    ]
    assert AWM.Settings(levels=(0, 2), times=2).problems(10) == [
        "rule.times: got 2, allowed is up to the noise levels (1)"
    ]
    assert AWM.Settings(implicit_beta=3.0).problems(10) == [
        "rule.implicit_beta: got 3.0, has no effect without rule.implicit"
    ]
