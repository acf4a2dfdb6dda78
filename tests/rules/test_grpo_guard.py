import numpy as np
import pytest
import torch

from diffalign.backends.toy import ToyPolicy
from diffalign.errors import UserError
from diffalign.rules import FlowGRPO, GRPOGuard
from diffalign.rules.grpo_guard import normalised
from tests.kit.helpers import gradient, rolled, toy_prompts, toy_trainer

S = GRPOGuard.Settings
KERNELS = [("flow_sde", 0.7), ("dance_sde", 0.3), ("cps", 0.8), ("ddim", 1.0)]


def moved(policy: ToyPolicy, size: float = 0.05) -> None:
    with torch.no_grad():
        policy.delta.add_(size * torch.randn(policy.delta.shape, generator=torch.Generator().manual_seed(1)))


def log_ratio(change: torch.Tensor, noise: torch.Tensor, std: float) -> torch.Tensor:
    """Mean-reduced log N(x'; mu + dmu, s) - log N(x'; mu, s) at x' = mu + s xi, from torch's own density."""
    new, old = (torch.distributions.Normal(mean, std) for mean in (change, torch.zeros_like(change)))
    x = std * noise
    return (new.log_prob(x) - old.log_prob(x)).flatten(1).mean(1)


def test_T17_the_normalised_log_ratio_is_the_inner_product_over_D():
    generator = torch.Generator().manual_seed(0)
    change, noise = (torch.randn(5, 3, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    found = normalised(log_ratio(change, noise, 0.3), change, 0.3, "full")
    torch.testing.assert_close(found, (change * noise).flatten(1).mean(1), rtol=1e-10, atol=1e-12)
    centred = normalised(log_ratio(change, noise, 0.3), change, 0.3, "mean")
    torch.testing.assert_close(centred, (change * noise).flatten(1).mean(1) / 0.3, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("std", [0.05, 0.3])
def test_T18_its_mean_is_0_and_its_spread_that_of_the_change_whatever_the_step(std):
    generator = torch.Generator().manual_seed(0)
    change = torch.full((1, 4096), 0.002, dtype=torch.float64)
    noise = torch.randn(4000, 4096, dtype=torch.float64, generator=generator)
    plain = log_ratio(change, noise, std)
    found = normalised(plain, change, std, "full")
    error = found.std() / len(found) ** 0.5
    assert found.mean().abs() < 4 * error
    assert found.std().item() == pytest.approx(3.125e-5, rel=0.03)  # standard deviation of a spread: 1.1 %
    # the plain one is not centred: E = -dmu^2 / (2 s^2)
    assert (plain.mean() + 0.002**2 / (2 * std**2)).abs() < 4 * plain.std() / len(plain) ** 0.5
    assert plain.mean() < -4 * plain.std() / len(plain) ** 0.5


@pytest.mark.parametrize(("process", "level"), KERNELS)
def test_T17_on_a_chain_for_every_kernel(process, level):
    """What the rule computes after the parameters moved, against <dmu, xi> / D from stored means and noises."""
    policy, rule = ToyPolicy(process=process, noise_level=level), GRPOGuard(S(inner_updates=2))
    plan, part, credit = rolled(rule, policy)
    moved(policy)
    for term in plan.updates[0]:
        k = term.start
        now = policy.transition(part, k)
        expected = ((now.mean - part.mean[k]) * part.eps[k]).mean(1)
        stored = torch.distributions.Normal(now.mean, now.std).log_prob(part.x[k + 1]).mean(1) - part.log_prob[k]
        found = normalised(stored, now.mean - part.mean[k], now.std, "full")
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-11)
        metrics = rule.loss(term, policy, part, credit, lambda media: media.pixels).metrics
        assert metrics["ratio"].item() == pytest.approx(expected.exp().mean().item(), abs=1e-12)


def test_T19_every_step_has_the_same_gradient_on_the_prediction_for_equal_noise():
    policy = ToyPolicy(steps=8)
    for weight, first in (("inv_dt", 1), ("equal", 0)):
        plan = GRPOGuard(S(step_weight=weight)).plan(policy.schedule, 0, np.random.default_rng(0))
        weights = np.array([term.weight for term in plan.updates[0]])
        # d log r_hat / d v = gain xi / D
        norms = (weights * policy.schedule.gain[:7])[first:]
        np.testing.assert_allclose(norms, norms[0], rtol=1e-10)
    assert plan.noise == (True,) * 7 + (False,)


def test_T20_the_bias_is_each_samples_own():
    policy, rule = ToyPolicy(), GRPOGuard(S(inner_updates=2))
    plan, part, credit = rolled(rule, policy)
    moved(policy)
    term = plan.updates[0][1]
    alone = rule.loss(term, policy, part.select([3]), credit.select(part.tree, [3]), None).metrics["ratio"].item()
    for others in ([3, 4], [3, 9]):
        rest = rule.loss(term, policy, part.select(others[1:]), credit.select(part.tree, others[1:]), None).metrics[
            "ratio"
        ]
        both = rule.loss(term, policy, part.select(others), credit.select(part.tree, others), None).metrics["ratio"]
        assert both.item() == pytest.approx((alone + rest.item()) / 2, abs=1e-14)


def test_T20_the_batch_mean_of_the_released_code_fails_it():
    generator = torch.Generator().manual_seed(0)
    change, noise = (torch.randn(4, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    plain = log_ratio(change, noise, 0.3)
    released = (plain + change.square().mean() / (2 * 0.3**2)) * 0.3
    assert (released - (change * noise).mean(1)).abs().max() > 0.1


def test_T21_on_policy_every_ratio_is_1_and_without_normalisation_it_is_flow_grpo():
    policy, rule = ToyPolicy(), GRPOGuard()
    plan, part, credit = rolled(rule, policy)
    for term in plan.updates[0]:
        loss = rule.loss(term, policy, part, credit, lambda media: media.pixels)
        assert loss.gap.item() == 0.0
        assert loss.metrics["ratio"].item() == 1.0
        assert "log_ratio_std" not in loss.metrics
    plain = GRPOGuard(S(ratio_norm="none", step_weight="none", clip=1e-4))
    expected = gradient(FlowGRPO(), ToyPolicy(), toy_prompts(2, 8))
    np.testing.assert_array_equal(gradient(plain, ToyPolicy(), toy_prompts(2, 8)), expected)


def test_T42_clipping_is_even_where_plain_ratios_are_cut_on_one_side():
    def sides(rule) -> tuple[float, float]:
        policy = ToyPolicy(dim=12)
        plan, part, credit = rolled(rule, policy, 4, 64)
        moved(policy, 0.5)
        losses = [rule.loss(term, policy, part, credit, None).metrics for term in plan.updates[0]]
        return tuple(float(np.mean([float(m[f"clip_{side}"]) for m in losses])) for side in ("low", "high"))

    low, high = sides(GRPOGuard(S(inner_updates=2)))
    assert abs(high - low) < 0.1
    low, high = sides(FlowGRPO(FlowGRPO.Settings(inner_updates=2)))
    assert low - high > 0.1


def test_the_clip_can_follow_the_ratios_own_spread():
    rule, policy = GRPOGuard(S(inner_updates=2, clip_std=2.0)), ToyPolicy()
    assert rule.clip == rule.settings.clip
    trainer = toy_trainer(rule, policy)
    metrics = trainer.update(0).metrics
    assert rule.spread == pytest.approx(metrics["log_ratio_std"])
    assert rule.clip == pytest.approx(2 * rule.spread)
    again = GRPOGuard(S(clip_std=2.0))
    again.load_state_dict(rule.state_dict())
    assert again.clip == rule.clip


def test_inv_dt_belongs_to_flows():
    with pytest.raises(UserError, match="inv_dt, which only a flow has; allowed here are none, equal, std"):
        GRPOGuard(S(step_weight="inv_dt")).plan(ToyPolicy(process="ddim").schedule, 0, np.random.default_rng(0))
