"""What tells a distilled network from a flow, on Gaussians whose every answer is known; and what that costs a matching rule."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffalign.backends.toy import ToyPolicy
from diffalign.ops import matching
from diffalign.rules import AWM, NFT, FlowGRPO, own_walk
from diffalign.rules._few_steps import OwnWalk, asked_levels
from tests.kit.helpers import toy_prompts

MEAN, STD = 0.8, 0.5  # of the samples, in every dimension


def drawn(count, seed=0):
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def posterior(sigma, count):
    """Samples x_0, the mean of x_0 given their x_t, and two draws given it; x_t = (1 - sigma) x_0 + sigma n."""
    alpha, x0 = 1 - sigma, MEAN + STD * drawn(count)
    x = alpha * x0 + sigma * drawn(count, 1)
    variance = (alpha * STD) ** 2 + sigma**2
    mean = MEAN + alpha * STD**2 / variance * (x - alpha * MEAN)
    std = STD * sigma / variance**0.5
    return x0, mean, *(mean + std * drawn(count, seed) for seed in (2, 3))


def parts(given, count=50):
    """D and q of each of so many parts: their mean and its standard error, (2,) each."""
    found = np.array([matching.against_own_walk(*some) for some in zip(*(t.chunk(count) for t in given), strict=True)])
    return found.mean(0), found.std(0, ddof=1) / count**0.5


@pytest.mark.parametrize("sigma", [1.0, 0.75, 0.5])
def test_R21_the_mean_has_q_0_and_D_1_a_draw_q_half_and_D_0(sigma):
    x0, mean, draw, other = posterior(sigma, 100_000)
    found, error = parts((mean, draw, x0))
    assert (np.abs(found - [1, 0]) < 3 * error).all()  # 3 standard errors, seeds are fixed
    found, error = parts((draw, draw, x0))
    assert found[0] == 0
    assert abs(found[1] - 0.5) < 3 * error[1]
    swapped, error = parts((x0, draw, mean))
    assert abs(swapped[1] - 1) < 3 * error[1]  # f and x_0 the wrong way round: 1 for a flow
    assert (
        abs(parts((draw, other, x0))[0][0] - 1) < 3 * parts((draw, other, x0))[1][0]
    )  # |f_s - f|^2 and |f - x_0|^2 alike


def test_R21_a_network_that_gives_its_samples_back_has_no_number():
    x0 = drawn(8)
    assert np.isnan(matching.against_own_walk(x0, x0, x0)).all()


class Exact(ToyPolicy):
    """Gaussian samples by the flow itself, or by a network that goes from noise to the flow's end in a straight line and says that end from
    everywhere on it."""

    def __init__(self, distilled, steps):
        super().__init__(steps=steps)
        self.distilled = distilled

    def network(self, x, time):
        sigma = time[:, None]
        alpha = 1 - sigma
        shrunk = 1 / (alpha * STD + sigma) if self.distilled else alpha * STD / ((alpha * STD) ** 2 + sigma**2)
        clean = MEAN + STD * shrunk * (x - alpha * MEAN)
        return (x - clean) / sigma


@pytest.mark.parametrize("steps", [3, 4, 8])
def test_a_networks_own_walk_tells_what_it_is(steps):
    flow, distilled = (own_walk(Exact(kind, steps), toy_prompts(4, 500)) for kind in (False, True))
    assert flow.levels == distilled.levels == (0, 1)
    assert distilled.distilled and max(distilled.gaps) < 1e-20 and distilled.shares[0] > 0.45
    assert (
        not flow.distilled and min(flow.gaps) > 0.15 and flow.gaps[0] > 0.3 and max(flow.shares) < 0.4
    )  # 1, 0 but for few steps


def test_the_last_step_and_noise_that_says_nothing_are_not_asked():
    flow, epsilon = ToyPolicy(steps=6).schedule, ToyPolicy(process="ddim", steps=6).schedule
    assert asked_levels(flow).tolist() == [0, 1]
    assert asked_levels(replace(epsilon, alpha=np.array([0.05, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0]))).tolist() == [1, 2]
    assert asked_levels(ToyPolicy(steps=2).schedule).tolist() == [0]
    nothing = replace(epsilon, timestep=epsilon.timestep[:2], alpha=np.array([0.05, 0.3, 1.0]))
    assert asked_levels(nothing).tolist() == []


def test_asking_changes_nothing_of_what_is_drawn_later():
    policy, prompts = ToyPolicy(), toy_prompts(2, 4)
    plan = AWM().plan(policy.schedule, 0, np.random.default_rng(0))
    before = policy.rollout(prompts, plan).x[-1]
    own_walk(policy, prompts)
    assert torch.equal(policy.rollout(prompts, plan).x[-1], before)
    assert policy.delta.grad is None


def test_it_is_said_as_D_and_q():
    found = OwnWalk((0, 1), (0.1, 0.3), (0.2, 0.3), 16)
    assert (str(found), found.distilled) == ("D 0.10 and 0.30, q 0.20 and 0.30, 16 samples", True)
    assert not replace(found, gaps=(0.3, 0.1)).distilled  # the noisiest level decides


@pytest.mark.parametrize("rule", [AWM, NFT])
def test_rules_that_noise_anew_say_so(rule):
    def anew(**given):
        return rule(rule.Settings(**given)).renoises(8)

    assert anew() and anew(levels=(0, 5)) and anew(levels=(4, 8))
    assert not anew(states="own") and not anew(levels=(0, 4))
    assert not FlowGRPO().renoises(8)
