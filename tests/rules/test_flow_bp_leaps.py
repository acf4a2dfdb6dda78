"""FlowBP-Lagrange: the reward's slope over two leaps, each a polynomial through the predictions at a few steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffalign.backends.toy import ToyPolicy, toy_reward
from diffalign.errors import UserError
from diffalign.ops import lagrange
from diffalign.processes import Levels
from diffalign.rules import TruncatedBP
from diffalign.rules import _slope as slopes
from diffalign.types import Plan
from tests.kit.helpers import gradient, toy_prompts, toy_trainer
from tests.rules.test_flow_bp import chosen, every_kernel, moved, planned, rule, whole

CLOSE = dict(rtol=1e-12, atol=1e-14)  # float64, sums in another order
ANGLE = np.linspace(1.4, 0.0, 9)


def straight_through(policy: ToyPolicy, given, plan: Plan, gamma: float, support: float) -> np.ndarray:
    """Autograd of both leaps written out as the paper has them: values replaced by the stored latents, one graph of everything."""
    steps, middle, part = chosen(plan), slopes.bridged(plan), whole(policy, False, given)
    delta, schedule = policy.delta.detach().clone().requires_grad_(), policy.schedule
    last = schedule.steps

    def network(x, k):
        time = torch.full((len(x), 1), float(schedule.sigma[k]), dtype=torch.float64)
        return torch.cat([x, time, torch.ones_like(time)], 1) @ (policy.base + delta).T

    def leap(x, calls, stop):
        """Slope and coordinate written out: v over sigma, or the noise over lambda = sigma / alpha of y = x / alpha."""
        flow = schedule.prediction == "velocity"
        coordinate = schedule.sigma if flow else schedule.sigma / schedule.alpha
        w = lagrange.weights(coordinate[calls], coordinate[calls[0]], coordinate[stop])
        total = x if flow else x / schedule.alpha[calls[0]]
        for m, k in enumerate(calls):
            at = x if m == 0 else part.x[k]
            shown = at * gamma + at.detach() * (1 - gamma) if m == 0 else at
            output = network(shown, k)
            output = output if m == 0 else support * output + (1 - support) * output.detach()
            a, s = schedule.alpha[k], schedule.sigma[k]
            slope = {
                "velocity": lambda o, z: o,
                "epsilon": lambda o, z: o,
                "v_prediction": lambda o, z, a=a, s=s: s * z + a * o,
                "sample": lambda o, z, a=a, s=s: (z - a * o) / s,
            }[schedule.prediction](output, at)
            total = total + w[m] * slope
        reached = total if flow else schedule.alpha[stop] * total
        return part.x[stop] + reached - reached.detach()

    first, second = [k for k in steps if k < middle], [k for k in steps if k >= middle]
    x = leap(leap(part.x[first[0]], first, middle), second, last)
    (-toy_reward(policy.decode(part, x), given).mean()).backward()
    return delta.grad.numpy()


@every_kernel
@pytest.mark.parametrize(("order", "gamma", "support"), [(3, 0.1, 0.25), (1, 0.3, 0.25), (2, 1.0, 1.0)])
def test_42_the_gradient_is_that_of_two_straight_through_leaps(process, order, gamma, support):
    policy, given = moved(process, steps=8), toy_prompts(2, 8)
    form = rule("lagrange", order=order, gamma=gamma, support=support)
    update = next(u for u in range(100) if slopes.bridged(planned(form, policy, u)) == 4)
    plan = planned(form, policy, update)
    expected = straight_through(policy, given, plan, gamma, support)
    np.testing.assert_allclose(gradient(form, policy, given, update=update), expected, **CLOSE)
    assert np.abs(expected).max() > 1e-3


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_42_the_same_where_the_latent_is_a_part_of_the_noise(kind):
    policy = moved("ddim", steps=8, levels=Levels(np.cos(ANGLE), np.sin(ANGLE), kind))
    given, form = toy_prompts(2, 8), rule("lagrange", gamma=0.3)
    expected = straight_through(policy, given, planned(form, policy), 0.3, 0.25)
    np.testing.assert_allclose(gradient(form, policy, given), expected, **CLOSE)


@every_kernel
def test_two_leaps_of_one_step_are_full_backpropagation(process):
    policy, given = moved(process, steps=2), toy_prompts(2, 8)
    exact = gradient(TruncatedBP(TruncatedBP.Settings(depth="all")), policy, given)
    np.testing.assert_allclose(gradient(rule("lagrange", gamma=1.0), policy, given), exact, **CLOSE)
    assert np.abs(gradient(rule("lagrange", gamma=0.9), policy, given) - exact).max() > 1e-4


def test_a_leap_asks_the_reward_once_and_the_network_at_its_calls():
    policy = moved("flow_sde", steps=12)
    form = rule("lagrange", order=2)
    update = next(u for u in range(100) if len(chosen(planned(form, policy, u))) == 4)
    trainer = toy_trainer(form, policy)
    trainer.update(update)
    assert (policy.rows_forward, policy.rows_backward) == (32 * (12 + 4), 32 * 4)


def test_micro_batches_and_norms_of_terms_change_nothing():
    policy, given = moved("ddim", steps=8), toy_prompts(4, 6)
    one = gradient(rule("lagrange"), policy, given)
    np.testing.assert_allclose(gradient(rule("lagrange"), policy, given, 5), one, rtol=1e-10, atol=1e-13)
    trainer = toy_trainer(rule("lagrange"), policy, 4, 6)
    trainer.backward.term_norms, trainer.draw = True, lambda _: given
    trainer.gradient(0)
    np.testing.assert_allclose(policy.delta.grad.numpy(), one, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"noise": True}, "rule.noise: got true with rule.connect lagrange"),
        ({"trained": 3}, "rule.trained: got 3 with rule.connect lagrange"),
        ({"depth": 1}, "rule.depth: got 1 with rule.connect lagrange; two leaps take two steps"),
        ({"rescale": 0.5}, "rule.rescale: got 0.5, has no effect without rule.connect: sparse or bridge"),
        ({"judged": (2, 3)}, "rule.judged: got [2, 3] with rule.connect lagrange"),
    ],
)
def test_settings_that_do_not_fit_are_named(given, expected):
    problems = rule(**{"connect": "lagrange", **given}).settings.problems(10)
    assert len(problems) == 1
    assert problems[0].startswith(expected)
    assert not rule("lagrange", late=2.0, gamma=0.1, order=1).settings.problems(10)


def test_a_sampler_that_begins_without_signal_is_refused_where_leaps_are_over_noise():
    angle = np.linspace(np.pi / 2, 0.0, 5)
    alpha = np.where(np.arange(5) == 0, 0.0, np.cos(angle))
    policy = ToyPolicy(process="ddim", levels=Levels(alpha, np.sin(angle), "v_prediction"))
    with pytest.raises(UserError, match="rule.depth: got all .* begins without signal"):
        planned(rule("lagrange"), policy)
    planned(rule("lagrange", depth=3), policy)
