"""FlowBP: the reward's slope handed to steps without a graph of the chain; numbers are the ones of the list of what each must hold."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
import torch

from diffalign.backends.toy import ToyPolicy
from diffalign.errors import Fault
from diffalign.processes import PROCESSES
from diffalign.rewards.base import as_reward
from diffalign.rules import TruncatedBP
from diffalign.rules import _slope as slopes
from diffalign.runtime.randomness import Purpose, numpy_generator
from diffalign.training.scoring import Clock
from diffalign.types import Plan
from tests.kit.helpers import gradient, shares_of, toy_prompts, toy_reward, toy_trainer

S = TruncatedBP.Settings
every_kernel = pytest.mark.parametrize("process", PROCESSES)
with_noise_or_not = pytest.mark.parametrize("noise", [False, True])
CLOSE = dict(rtol=1e-12, atol=1e-14)  # float64, sums in another order


def rule(connect: str = "sparse", **given) -> TruncatedBP:
    return TruncatedBP(S(**{"connect": connect, "depth": "all", **given}))


def planned(rule: TruncatedBP, policy: ToyPolicy, update: int = 0) -> Plan:
    """The trainer's."""
    return rule.plan(policy.schedule, update, numpy_generator(0, Purpose.PLAN, update))


def chosen(plan: Plan) -> list[int]:
    return sorted(term.start for term in plan.updates[0] if term.through == "slope")


def whole(policy: ToyPolicy, noise: bool, given):
    steps = policy.schedule.steps
    return policy.rollout(given, Plan(steps, (noise,) * (steps - 1) + (False,), ()))


def moved(process: str, **kwargs) -> ToyPolicy:
    policy = ToyPolicy(process=process, **kwargs)
    with torch.no_grad():
        policy.delta.add_(0.1)
    return policy


@every_kernel
@with_noise_or_not
@pytest.mark.parametrize("trained", [None, 2])
def test_40_sparse_is_the_detached_chain_of_the_drawn_steps(process, noise, trained):
    policy, given = moved(process), toy_prompts(2, 8)
    form = rule(noise=noise, trained=trained)
    found = gradient(form, policy, given)
    steps, policy.delta.grad = chosen(planned(form, policy)), None
    assert len(steps) == (trained or 4)
    part = whole(policy, noise, given)
    end = policy.replay(part, 0, 4, steps, detached=True).x
    (-toy_reward(policy.decode(part, end), given).mean()).backward()
    np.testing.assert_allclose(found, policy.delta.grad.numpy(), **CLOSE)
    assert np.abs(found).max() > 1e-3


def with_bridge_at(form: TruncatedBP, policy: ToyPolicy, step: int) -> int:
    """An update that draws it."""
    return next(u for u in range(100) if slopes.bridged(planned(form, policy, u)) == step)


@every_kernel
@with_noise_or_not
def test_41_a_bridge_over_the_last_of_two_steps_is_full_backpropagation(process, noise):
    policy, given = moved(process, steps=2), toy_prompts(2, 8)
    exact = gradient(TruncatedBP(S(depth="all", noise=noise)), policy, given)
    form = rule("bridge", gamma=1.0, noise=noise)
    update = with_bridge_at(form, policy, 1)
    np.testing.assert_allclose(gradient(form, policy, given, update=update), exact, **CLOSE)
    sparse = gradient(rule(noise=noise), policy, given)
    none = gradient(rule("bridge", gamma=0.0, noise=noise), policy, given, update=update)
    np.testing.assert_allclose(none, sparse, **CLOSE)
    assert np.abs(exact - sparse).max() > 1e-4


@every_kernel
@with_noise_or_not
@pytest.mark.parametrize(("gamma", "rescale"), [(0.3, 0.0), (1.0, 0.7)])
def test_41_a_bridge_is_a_chain_whose_other_inputs_carry_nothing(process, noise, gamma, rescale):
    """Autograd on the chain written out: x_j reaches its network as gamma x_j + (1 - gamma) sg[x_j], others as sg[x]."""
    policy, given = moved(process), toy_prompts(2, 8)
    form = rule("bridge", trained=3, gamma=gamma, rescale=rescale, noise=noise)
    update = next(u for u in range(100) if chosen(plan := planned(form, policy, u)).index(slopes.bridged(plan)) == 1)
    plan = planned(form, policy, update)
    steps, bridge, part = chosen(plan), slopes.bridged(plan), whole(policy, noise, given)
    delta, x = policy.delta.detach().clone().requires_grad_(), part.x[0]
    c = []
    for k in range(4):
        table = policy.noisy if noise and k < 3 else policy.quiet
        shown = gamma * x + (1 - gamma) * x.detach() if k == bridge else x.detach()
        time = torch.full((len(x), 1), float(policy.schedule.sigma[k]), dtype=torch.float64)
        output = torch.cat([shown, time, torch.ones_like(time)], 1) @ (policy.base + delta).T
        x = float(table.x[k]) * x + float(table.prediction[k]) * (output if k in steps else output.detach())
        if part.eps[k] is not None:
            x = x + float(table.std[k]) * part.eps[k]
        c = [value * float(table.x[k]) for value in c] + [float(table.prediction[k])]
    (-toy_reward(policy.decode(part, x), given).mean()).backward()
    scale = 1 + rescale * (np.abs(c).sum() / np.abs([c[k] for k in steps]).sum() - 1)
    np.testing.assert_allclose(gradient(form, policy, given, update=update), scale * delta.grad.numpy(), **CLOSE)


@every_kernel
@with_noise_or_not
def test_43_sensitivities_are_autograds_of_the_chain_with_frozen_predictions(process, noise):
    policy, given = moved(process), toy_prompts(1, 2)
    part = whole(policy, noise, given)
    a, b = slopes.coefficients(policy, part.plan)
    frozen = [policy.transition(part, k).prediction.detach().requires_grad_() for k in range(4)]
    x = part.x[0]
    for k, prediction in enumerate(frozen):
        x = a[k] * x + b[k] * prediction + (0.0 if part.eps[k] is None else part.std[k] * part.eps[k])
    torch.testing.assert_close(x, part.x[4])
    x.sum().backward()
    for k, prediction in enumerate(frozen):
        assert prediction.grad[0, 0].item() == pytest.approx(slopes.sensitivities(a, b)[k], rel=1e-12)


@pytest.mark.parametrize("form", [rule(trained=2), rule("bridge", trained=3)], ids=["sparse", "bridge"])
def test_45_the_slope_is_that_of_the_stored_endpoint_and_of_no_other(form):
    policy, given = moved("flow_sde"), toy_prompts(2, 8)
    seen, decode = [], policy.decode
    stored = whole(policy, False, given).x[4]

    def kept(part, x):
        seen.append(x.detach().clone())
        return decode(part, x)

    policy.decode = kept
    right = gradient(form, policy, given)
    assert [tuple(x.shape) for x in seen] == [tuple(stored.shape)]  # one call of decoder and reward
    assert torch.equal(seen[0], stored)
    policy.decode = lambda part, x: decode(part, x + 0.1)  # the slope of a neighbour
    assert np.abs(gradient(form, policy, given) - right).max() > 1e-3


def test_45_latents_that_are_not_the_networks_own_are_a_fault():
    policy = moved("flow_sde")
    trainer = toy_trainer(rule(), policy)
    sampled = trainer._sample(0, Clock.of(policy))
    sampled.rollout.x[2] = sampled.rollout.x[2] + 1e-6
    with pytest.raises(Fault, match="the replay differs from the rollout by 1e-06"):
        trainer._gradient(shares_of(trainer, sampled), sampled, 0, 0)


def orders(steps: range, count: int, late: float):
    """Every order of drawing, and how likely it is."""
    p = np.array([(k + 1.0) ** late for k in steps])
    for order in itertools.permutations(steps, count):
        left, chance = p.sum(), 1.0
        for k in order:
            chance, left = chance * p[k - steps.start] / left, left - p[k - steps.start]
        yield list(order), chance


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("late", [0.0, 1.0, 4.0])
def test_46_inverse_weights_sum_to_every_step_once_on_average(count, late):
    """Over every order of drawing, by how likely it is."""
    steps, total = range(1, 5), np.zeros(5)
    for order, chance in orders(steps, count, late):
        for k, weight in zip(order, slopes.inverse(order, steps, late), strict=True):
            total[k] += chance * weight
    np.testing.assert_allclose(total, [0, 1, 1, 1, 1], rtol=1e-12)


def test_46_the_mean_over_draws_is_the_gradient_of_all_steps():
    policy, given = moved("ddim"), toy_prompts(2, 8)
    form, every = rule(trained=2, weighting="inverse"), gradient(rule(), policy, given)
    found: dict = {}
    for update in range(400):
        plan = planned(form, policy, update)
        order = tuple((term.start, round(term.weight, 9)) for term in plan.updates[0][1:])
        if order not in found:
            found[order] = gradient(form, policy, given, update=update)
    assert len(found) == 12  # ordered pairs of four steps
    mean, total = np.zeros_like(every), 0.0
    for order, chance in orders(range(4), 2, 1.0):
        weights = slopes.inverse(order, range(4), 1.0)
        mean += chance * found[tuple(sorted((k, round(w, 9)) for k, w in zip(order, weights, strict=True)))]
        total += chance
    assert total == pytest.approx(1)
    np.testing.assert_allclose(mean, every, rtol=1e-10, atol=1e-13)


def test_steps_are_drawn_late_and_all_in_turn():
    rng = np.random.default_rng(0)
    first = np.bincount([slopes.drawn(range(4), 2, 1.0, rng)[0] for _ in range(4000)], minlength=4)
    for k in range(4):  # p = (k + 1) / 10
        p = (k + 1) / 10
        assert abs(first[k] - 4000 * p) < 4.5 * math.sqrt(4000 * p * (1 - p))
    assert sorted(slopes.drawn(range(2, 6), 4, 4.0, rng)) == [2, 3, 4, 5]


@pytest.mark.parametrize("form", [{}, {"trained": 2, "rescale": 1.0}])
def test_rescaling_in_full_makes_up_for_steps_that_are_left_out(form):
    policy = moved("flow_sde")
    a, b = slopes.coefficients(policy, Plan(4, (False,) * 4, ()))
    c = np.abs(slopes.sensitivities(a, b))
    steps = chosen(planned(rule(**form), policy))
    scale = slopes.rescaled(a, b, range(4), steps, form.get("rescale", 0.0))
    assert scale * c[steps].sum() == pytest.approx(c.sum() if form else c[steps].sum())


@pytest.mark.parametrize("connect", ["sparse", "bridge"])
def test_micro_batches_and_norms_of_terms_change_nothing(connect):
    policy, given = moved("flow_sde"), toy_prompts(4, 6)
    form = functools.partial(rule, connect, trained=3, noise=True, objective="hinge", target=0.5)
    one = gradient(form(), policy, given)
    np.testing.assert_allclose(gradient(form(), policy, given, 5), one, rtol=1e-10, atol=1e-13)
    trainer = toy_trainer(form(), policy, 4, 6)
    trainer.backward.term_norms, trainer.draw = True, lambda _: given
    norms = trainer.gradient(0).term_norms
    np.testing.assert_allclose(policy.delta.grad.numpy(), one, rtol=1e-10, atol=1e-13)
    assert sorted(norms) == [(k, k + 1) for k in chosen(planned(form(), policy))]


def test_the_reward_is_asked_once_and_only_drawn_steps_are_taken_a_gradient_of():
    policy, asked = moved("flow_sde"), []
    trainer = toy_trainer(rule("bridge", trained=2), policy)

    def reward(media, prompts):
        asked.append(len(prompts))
        return toy_reward(media, prompts)

    trainer.scorer.rewards["toy"] = as_reward(reward)
    update = trainer.update(0)
    assert (sum(asked), update.scored) == (32, 32)
    assert (policy.rows_forward, policy.rows_backward) == (32 * (4 + 2), 32 * 2)
    assert np.isfinite(update.metrics["reward/toy"])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {"connect": "chain", "gamma": 0.1},
            "rule.gamma: got 0.1, has no effect without rule.connect: bridge or lagrange",
        ),
        ({"gamma": 0.1}, "rule.gamma: got 0.1, has no effect without rule.connect: bridge or lagrange"),
        ({"order": 2}, "rule.order: got 2, has no effect without rule.connect: lagrange"),
        ({"depth": (2, 4)}, "rule.depth: got [2, 4] with rule.connect sparse"),
        ({"judged": (2, 3)}, "rule.judged: got [2, 3] with rule.connect sparse"),
        ({"variants": 2, "depth": 1}, "rule.variants: got 2 with rule.connect sparse"),
        ({"detached": True}, "rule.detached: got true with rule.connect sparse"),
        ({"rescale": 0.5}, "rule.rescale: got 0.5, has no effect without rule.trained"),
        ({"trained": 3, "rescale": 0.5, "weighting": "inverse"}, "rule.rescale: got 0.5 with rule.weighting inverse"),
        (
            {"connect": "bridge", "trained": 3, "weighting": "inverse"},
            "rule.weighting: got inverse with rule.connect bridge",
        ),
        ({"connect": "bridge", "trained": 1}, "rule.trained: got 1 with rule.depth all; a bridge"),
        ({"trained": 11}, "rule.trained: got 11, allowed is up to the least steps with gradient (10)"),
    ],
)
def test_settings_that_do_not_fit_are_named(given, expected):
    assert any(expected in line for line in rule(**{"connect": "sparse", **given}).settings.problems(10))
    assert not rule(trained=4, rescale=0.5).settings.problems(10)
    assert not rule("bridge", trained=5, late=4.0, gamma=0.25).settings.problems(10)
