import numpy as np
import pytest
import torch

from diffalign.backends.toy import ToyPolicy
from diffalign.rules import TruncatedBP
from tests.helpers import gradient, toy_prompts, toy_reward

S = TruncatedBP.Settings


def written_out(policy: ToyPolicy, given, depth: int, noise: bool) -> np.ndarray:
    """-dR/dtheta by autograd on the chain written out, cut `depth` steps before the end."""
    from diffalign.types import Plan

    steps = policy.schedule.steps
    part = policy.rollout(given, Plan(steps, (noise,) * (steps - 1) + (False,), ()))
    delta = policy.delta.detach().clone().requires_grad_()
    x = part.x[steps - depth]
    for k in range(steps - depth, steps):
        table = policy.noisy if noise and k < steps - 1 else policy.quiet
        time = torch.full((len(x), 1), float(policy.schedule.sigma[k]), dtype=torch.float64)
        output = torch.cat([x, time, torch.ones_like(time)], 1) @ (policy.base + delta).T
        x = float(table.x[k]) * x + float(table.prediction[k]) * output
        if noise and k < steps - 1:
            x = x + float(table.std[k]) * part.eps[k]
    (-toy_reward(policy.decode(part, x), given).mean()).backward()
    return delta.grad.numpy()


@pytest.mark.parametrize("process", ["flow_sde", "ddim"])
@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("noise", [False, True])
def test_invariant_1_the_gradient_of_the_last_k_steps(process, depth, noise):
    policy, given = ToyPolicy(process=process), toy_prompts(2, 8)
    found = gradient(TruncatedBP(S(depth=depth, noise=noise)), policy, given)
    np.testing.assert_allclose(found, written_out(policy, given, depth, noise), rtol=1e-10, atol=1e-14)


def test_all_is_every_step_and_other_depths_differ():
    policy, given = ToyPolicy(), toy_prompts(2, 8)
    whole = gradient(TruncatedBP(S(depth="all")), policy, given)
    np.testing.assert_array_equal(whole, gradient(TruncatedBP(S(depth=4)), policy, given))
    assert np.abs(whole - gradient(TruncatedBP(S(depth=3)), policy, given)).max() > 1e-4


def test_sampling_stops_where_the_gradient_begins():
    schedule = ToyPolicy().schedule
    plan = TruncatedBP(S(depth=3)).plan(schedule, 0, np.random.default_rng(0))
    assert plan.stop == 1
    assert [(t.start, t.stop, t.through) for t in plan.updates[0]] == [(1, 4, "reward")]


def test_random_depths_cover_their_range_evenly_and_follow_the_generator():
    rule, schedule = TruncatedBP(S(depth=(1, 4))), ToyPolicy().schedule
    rng = np.random.default_rng(0)
    depths = np.array([4 - rule.plan(schedule, k, rng).stop for k in range(4000)])
    counts = np.bincount(depths, minlength=5)[1:]
    # 1000 expected each, standard deviation 27
    assert (np.abs(counts - 1000) < 4 * 27.4).all()
    again = [rule.plan(schedule, 0, np.random.default_rng(5)).stop for _ in range(2)]
    assert again[0] == again[1]


def test_a_hinge_pulls_only_what_lies_below_it():
    policy, given = ToyPolicy(), toy_prompts(2, 8)
    plain = gradient(TruncatedBP(S(depth=2)), policy, given)
    np.testing.assert_allclose(gradient(TruncatedBP(S(depth=2, objective="hinge", target=1e6)), policy, given), plain)
    assert (gradient(TruncatedBP(S(depth=2, objective="hinge", target=-1e6)), policy, given) == 0).all()
    rule = TruncatedBP(S(depth=2, objective="hinge", target=0.0))
    part = policy.rollout(given, rule.plan(policy.schedule, 0, np.random.default_rng(0)))
    term = rule.plan(policy.schedule, 0, np.random.default_rng(0)).updates[0][0]
    value = torch.tensor([-1.0, 0.5, -3.0], dtype=torch.float64)
    loss = rule.loss(term, policy, part, None, lambda media: value)
    assert loss.value.item() == pytest.approx((1 + 0 + 3) / 3)
    assert loss.metrics["below_target"].item() == pytest.approx(2 / 3)


def test_training_rewards_are_logged_though_sampling_stops_early():
    from tests.helpers import toy_trainer

    metrics = toy_trainer(TruncatedBP(S(depth=1)), ToyPolicy()).update(0)
    assert metrics["reward/total"] == pytest.approx(metrics["reward/toy"])
    assert np.isfinite(metrics["reward/total"])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"depth": 11}, "rule.depth: got 11, allowed is 1 <= low <= high <= sampler.steps (10)"),
        ({"depth": (3, 2)}, "rule.depth: got [3, 2]"),
        ({"objective": "hinge"}, "rule.target: got None with objective hinge"),
        ({"target": 1.0}, "rule.target: got 1.0 with objective linear"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, expected):
    assert any(expected in line for line in S(**settings).problems(10))
    assert not S(depth=10).problems(10)
