from dataclasses import replace

import numpy as np
import pytest
import torch

from diffalign.backends.toy import ToyPolicy
from diffalign.rules import TruncatedBP
from diffalign.runtime.randomness import Purpose, normal, numpy_generator
from diffalign.types import Media
from tests.kit.helpers import gradient, toy_prompts, toy_reward

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
    from tests.kit.helpers import toy_trainer

    metrics = toy_trainer(TruncatedBP(S(depth=1)), ToyPolicy()).update(0).metrics
    assert metrics["reward/total"] == pytest.approx(metrics["reward/toy"])
    assert np.isfinite(metrics["reward/total"])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"depth": 11}, "rule.depth: got 11, allowed is 1 <= low <= high <= sampler.steps (10)"),
        ({"depth": (3, 2)}, "rule.depth: got [3, 2]"),
        ({"objective": "hinge"}, "rule.target: got None with objective hinge"),
        ({"target": 1.0}, "rule.target: got 1.0 with objective linear"),
        ({"variants": 2, "depth": 2}, "rule.variants: got 2; allowed with depth 1"),
        ({"judged": (0, 3)}, "rule.judged: got [0, 3], allowed is 1 <= low <= high <= sampler.steps (10)"),
        ({"judged": (2, 3), "depth": 3}, "rule.depth: got 3, allowed is up to the least of rule.judged (2), or all"),
        ({"trained": 2}, "rule.trained: got 2 without rule.detached"),
        (
            {"trained": 4, "detached": True, "depth": "all", "judged": (3, 9)},
            "rule.trained: got 4, allowed is up to the least steps with gradient (3)",
        ),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, expected):
    assert any(expected in line for line in S(**settings).problems(10))
    assert not S(depth=10).problems(10)


# -- relatives


def setting(policy: ToyPolicy, given, rule: TruncatedBP):
    plan = rule.plan(policy.schedule, 0, numpy_generator(0, Purpose.PLAN, 0))  # the trainer's
    return plan, policy.rollout(given, plan)


def output(policy: ToyPolicy, x: torch.Tensor, step: int, delta: torch.Tensor) -> torch.Tensor:
    time = torch.full((len(x), 1), float(policy.schedule.sigma[step]), dtype=torch.float64)
    return torch.cat([x, time, torch.ones_like(time)], 1) @ (policy.base + delta).T


def reward_gradient(policy: ToyPolicy, x: torch.Tensor, given) -> torch.Tensor:
    """-d mean R / d x at finished latents."""
    x = x.detach().requires_grad_()
    (-toy_reward(policy.pixels(given, x), given).mean()).backward()
    return x.grad


@pytest.mark.parametrize("process", ["flow_sde", "ddim"])
@pytest.mark.parametrize("trained", [None, 2])
def test_invariant_21_drtune_is_a_product_of_scalars(process, trained):
    """The gradient of copy t is (product of a_s after t) b_t (d net / d theta)^T dR/dx."""
    policy, given = ToyPolicy(process=process), toy_prompts(2, 8)
    rule = TruncatedBP(S(depth="all", detached=True, trained=trained))
    plan, part = setting(policy, given, rule)
    steps = plan.updates[0][0].steps or range(4)
    assert len(steps) == (trained or 4)
    x, features = part.x[0], []
    for k in range(4):
        time = torch.full((len(x), 1), float(policy.schedule.sigma[k]), dtype=torch.float64)
        features.append(torch.cat([x, time, torch.ones_like(time)], 1))
        x = (
            float(policy.quiet.x[k]) * x + float(policy.quiet.prediction[k]) * output(policy, x, k, policy.delta)
        ).detach()
    slope = reward_gradient(policy, x, given)
    expected = sum(
        np.prod(policy.quiet.x[k + 1 :]) * policy.quiet.prediction[k] * (slope.T @ features[k]) for k in steps
    )
    np.testing.assert_allclose(gradient(rule, policy, given), expected.numpy(), rtol=1e-10, atol=1e-14)


def test_drtune_trains_evenly_spaced_steps_from_every_offset():
    rule, rng = TruncatedBP(S(depth="all", detached=True, trained=3, judged=(6, 10))), np.random.default_rng(0)
    plans = [rule.plan(ToyPolicy(steps=10).schedule, k, rng).updates[0][0] for k in range(400)]
    assert {term.stop for term in plans} == set(range(6, 11))
    for term in plans:
        assert len({b - a for a, b in zip(term.steps, term.steps[1:], strict=False)}) == 1
        assert 0 <= term.steps[0] <= term.steps[-1] < term.stop
    assert {term.steps[0] for term in plans} == {0, 1, 2}


@pytest.mark.parametrize("process", ["flow_sde", "ddim"])
def test_refl_judges_the_clean_sample_a_step_implies(process):
    policy, given = ToyPolicy(process=process), toy_prompts(2, 8)
    rule = TruncatedBP(S(judged=(2, 2)))
    _, part = setting(policy, given, rule)
    delta = policy.delta.detach().clone().requires_grad_()
    x, k = part.x[1], 1
    alpha, sigma = float(policy.schedule.alpha[k]), float(policy.schedule.sigma[k])
    network = output(policy, x, k, delta)
    clean = x - sigma * network if process == "flow_sde" else (x - sigma * network) / alpha
    (-toy_reward(policy.pixels(given, clean), given).mean()).backward()
    np.testing.assert_allclose(gradient(rule, policy, given), delta.grad.numpy(), rtol=1e-10, atol=1e-14)
    assert np.abs(gradient(TruncatedBP(S(depth=1)), policy, given) - delta.grad.numpy()).max() > 1e-4


def test_draft_lv_averages_the_last_step_over_new_noise():
    policy, given = ToyPolicy(), toy_prompts(2, 8)
    rule = TruncatedBP(S(variants=2))
    plan, part = setting(policy, given, rule)
    delta = policy.delta.detach().clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for number, term in enumerate(plan.updates[0]):
        x = part.x[3]
        if number:
            noise = normal([int(s) for s in given.seed], (3,), Purpose.VARIANT, term.draw, like=x)
            x = (1 - float(policy.schedule.sigma[3])) * part.x[4] + float(policy.schedule.sigma[3]) * noise
        end = float(policy.quiet.x[3]) * x + float(policy.quiet.prediction[3]) * output(policy, x, 3, delta)
        total = total - toy_reward(policy.pixels(given, end), given).mean() / 3
    total.backward()
    np.testing.assert_allclose(gradient(rule, policy, given), delta.grad.numpy(), rtol=1e-10, atol=1e-14)
    # invariant 21: without variants it is DRaFT-1
    one = gradient(TruncatedBP(S(variants=0)), policy, given)
    np.testing.assert_array_equal(one, gradient(TruncatedBP(S(depth=1)), policy, given))


@pytest.mark.parametrize(
    ("which", "expected"), [("all", [0, 1, 2, 3, 4]), ("three", [0, 2, 4]), ("alternate", [0, 2, 4])]
)
def test_vader_judges_some_frames(which, expected):
    assert judged_frames(which, 0) == expected


def test_vader_draws_one_frame_evenly():
    counts = np.bincount([judged_frames("random", draw)[0] for draw in range(500)], minlength=5)
    assert (np.abs(counts - 100) < 4.5 * 8.9).all()  # standard deviation 8.9


def judged_frames(which: str, draw: int) -> list[int]:
    """The frames a reward is shown of five, each of its index's brightness."""
    policy, given = ToyPolicy(), toy_prompts(1, 2)
    rule = TruncatedBP(S(frames=which))
    plan, part = setting(policy, given, rule)
    term = replace(plan.updates[0][0], draw=draw)
    part = replace(part, plan=replace(part.plan, updates=((term,),)))
    frames = torch.arange(5, dtype=torch.float64).view(1, 5, 1, 1, 1).expand(2, 5, 3, 1, 1)
    policy.decode = lambda part, x: Media(frames + 0 * x.sum())
    seen: list[torch.Tensor] = []

    def reward(media):
        seen.append(media.pixels[0, :, 0, 0, 0].detach())
        return media.pixels.flatten(1).sum(1)

    rule.loss(term, policy, part, None, reward)
    return [int(value) for value in seen[0]]
