"""`weight: elbo` of awm on an exact Gaussian flow, whose density is known: what a matching error says of log p, and how surely."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffalign.backends.toy import ToyPolicy
from diffalign.errors import UserError
from diffalign.ops import matching
from diffalign.processes import Levels
from diffalign.rules import AWM
from diffalign.rules._forward import noised
from diffalign.types import Credit
from tests.kit.helpers import toy_prompts

STEPS, ROWS = 64, 16


def grid(kind: str, along: str) -> Levels:
    """Levels evenly spaced in time, or in lambda = log(alpha^2 / sigma^2)."""
    flow = kind == "velocity"
    if along == "t":
        time = np.linspace(1.0, 0.0, STEPS + 1)
        alpha, sigma = (1 - time, time) if flow else (np.cos(1.56 * time), np.sin(1.56 * time))
    else:
        signal = np.exp(np.linspace(-6.0, 6.0, STEPS))  # alpha / sigma
        alpha = signal / (1 + signal) if flow else signal / np.sqrt(1 + signal**2)
        alpha, sigma = np.append(alpha, 1.0), np.append(1 - alpha if flow else np.sqrt(1 - alpha**2), 0.0)
    return Levels(alpha, sigma, kind)


class GaussianPolicy(ToyPolicy):
    """Predicts exactly for data N(m, s^2) in each dimension: m = delta[:, 0], log s = delta[:, 1]."""

    def network(self, x, time):
        mean, std = self.delta[:, 0], self.delta[:, 1].exp()
        sigma = time[:, None].to(x.dtype)
        flow = self.schedule.prediction == "velocity"
        alpha = 1 - sigma if flow else (1 - sigma**2).sqrt()
        x0 = mean + std**2 * alpha * (x - alpha * mean) / (std**2 * alpha**2 + sigma**2)
        noise = (x - alpha * x0) / sigma
        return {"velocity": noise - x0, "epsilon": noise, "v_prediction": alpha * noise - sigma * x0, "sample": x0}[
            self.schedule.prediction
        ]

    def log_density(self, x):
        """(N,) of x (N, 3)."""
        return torch.distributions.Normal(self.delta[:, 0], self.delta[:, 1].exp()).log_prob(x).sum(1).detach()


def gaussian(kind: str = "velocity", along: str = "t", towards: float = 0.0):
    """A policy that has moved, samples (N, 3) of what it was, and log p - log p_old of each; towards: so far they lie where it went."""
    policy = GaussianPolicy(levels=grid(kind, along), process="flow_sde" if kind == "velocity" else "ddim")
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        policy.delta[:, :2] = torch.tensor([[0.3, -0.2], [-0.5, 0.1], [0.1, 0.0]], dtype=torch.float64)
        policy.add_shadows({"old": 0.0})
        old = policy.delta.detach().clone()
        moved = torch.tensor([[0.25, 0.1], [0.15, -0.05], [-0.2, 0.12]], dtype=torch.float64)
        x0 = (
            old[:, 0] + old[:, 1].exp() * torch.randn(ROWS, 3, generator=g, dtype=torch.float64) + towards * moved[:, 0]
        )
        before = policy.log_density(x0)
        policy.delta[:, :2] += moved
    rule = AWM(AWM.Settings(weight="elbo", times=1))
    part = policy.rollout(toy_prompts(4, ROWS // 4), rule.plan(policy.schedule, 0, np.random.default_rng(0)))
    return policy, replace(part, x=[*part.x[:-1], x0]), (policy.log_density(x0) - before).numpy()


@torch.no_grad()
def log_ratios(policy, part, draws: int, plans: int, wrong: str = "") -> np.ndarray:
    """(plans, N) log-ratios of `draws` levels and noises each; `wrong`: with noises of their own, or levels all equal."""
    rule, found = AWM(AWM.Settings(weight="elbo", times=draws, spread="random")), []
    for seed in range(plans):
        terms = rule.plan(policy.schedule, 0, np.random.default_rng(seed)).updates[0]
        if wrong == "one level":
            terms = [replace(term, start=terms[seed % draws].start) for term in terms]
        total = 0.0
        for term in terms:
            at = noised(term, policy, part)
            now = rule._log_p(at, at.predicted(policy))
            if wrong == "two noises":
                at = noised(replace(term, draw=term.draw + 1), policy, part)
            with policy.shadow("old"):
                total = total + term.weight * (now - rule._log_p(at, at.predicted(policy)))
        found.append(total.numpy())
    return np.stack(found)


def z_score(found: np.ndarray, truth: np.ndarray) -> float:
    """How many standard errors the mean over plans is from the truth; rows of a plan share their levels, plans are independent."""
    apart = (found - truth).mean(1)
    return float(apart.mean() / (apart.std(ddof=1) / np.sqrt(len(apart))))


@pytest.mark.parametrize(
    ("kind", "along"),
    [("velocity", "t"), ("velocity", "lambda"), ("epsilon", "t"), ("v_prediction", "t"), ("sample", "lambda")],
)
def test_R4_the_mean_log_ratio_is_the_densities(kind, along, monkeypatch):
    policy, part, truth = gaussian(kind, along, towards=6.0)
    found = log_ratios(policy, part, 16, 20)
    assert abs(z_score(found, truth)) < 3  # once in 370 seeds by chance
    assert abs(z_score(2 * found, truth)) > 5  # without 1/2
    right = matching.elbo_weights
    monkeypatch.setattr(matching, "elbo_weights", lambda alpha, sigma, _: right(alpha, sigma, "epsilon"))  # s_k = 1
    assert kind == "epsilon" or abs(z_score(log_ratios(policy, part, 16, 20), truth)) > 5


def test_R5_the_ratios_mean_falls_to_one_from_above():
    """exp of a mean of K draws is too large, by half of its variance in the logarithm; with a noise for each policy it is hopeless."""
    policy, part, truth = gaussian()
    exact = np.exp(truth).mean()  # of these rows
    means = [np.exp(log_ratios(policy, part, draws, 30)).mean() / exact for draws in (1, 4, 16)]
    assert means[0] > means[1] > means[2] > 1 - 0.03  # the last one's own standard error is 0.013
    assert means[2] < 1.1
    apart = log_ratios(policy, part, 16, 20, "two noises") - truth
    assert apart.std() > 10 * (log_ratios(policy, part, 16, 10) - truth).std()


def test_R6_four_times_the_draws_halve_the_error():
    policy, part, truth = gaussian()

    def halves(wrong: str = "") -> float:
        four, sixteen = ((log_ratios(policy, part, draws, 40, wrong) - truth).std() for draws in (4, 16))
        return four / sixteen

    # 2, and sqrt((63 - 4) / (63 - 16)) = 1.12 more as no level is drawn twice; 40 draws of levels know either to some 15 %
    assert halves() > 1.85
    assert halves("one level") < 1.65


@pytest.mark.parametrize("weight", ["elbo", "adaptive"])
def test_R8_networks_of_one_denoiser_have_one_error(weight):
    """On the same levels and noises epsilon, v and x_0 say the same, however they are predicted."""
    found = []
    for kind in ("epsilon", "v_prediction", "sample"):
        policy, part, _ = gaussian(kind, "lambda")
        rule = AWM(AWM.Settings(weight=weight, times=4))
        terms = rule.plan(policy.schedule, 0, np.random.default_rng(0)).updates[0]
        with torch.no_grad():
            at = [noised(term, policy, part) for term in terms]
            found.append(torch.stack([rule._log_p(each, each.predicted(policy)) for each in at]))
    torch.testing.assert_close(
        found[1], found[0], rtol=1e-6, atol=0
    )  # x_0 from epsilon divides by alpha, 0.003 at the least
    torch.testing.assert_close(found[2], found[0], rtol=1e-6, atol=0)


def test_R25_what_has_no_finite_weight_is_refused():
    settings = AWM.Settings(weight="elbo", first_level=True)
    with pytest.raises(UserError, match="rule.first_level: got true, pure noise has no finite weight: elbo"):
        AWM(settings).plan(ToyPolicy().schedule, 0, np.random.default_rng(0))
    assert AWM(settings).plan(ToyPolicy(process="ddim").schedule, 0, np.random.default_rng(0)).updates  # alpha > 0
    for alpha, sigma in (([0.0, 0.5], [1.0, 0.5]), ([0.5, 1.0], [0.5, 0.0]), ([0.5], [0.5])):
        with pytest.raises(ValueError, match="elbo_weights: two levels or more, each with signal and noise"):
            matching.elbo_weights(np.array(alpha), np.array(sigma), "velocity")
    assert AWM.Settings(weight="elbo", clip=0.01).problems(10) == [
        "rule.clip: got 0.01, weight: elbo sums over latent dimensions; allowed is 1 or more, or another rule.row"
    ]
    assert not AWM.Settings(weight="elbo", row="ratio").problems(10)
    assert AWM.Settings(weight="elbo", times=1, levels=(4, 5)).problems(10) == [
        "rule.weight: got elbo with one noise level; allowed with two or more in rule.levels"
    ]


def test_a_first_pass_is_held_to_rounding_of_what_was_summed():
    """Where every sum is thousands of nats, 1e-4 of them is what kernels differ by."""
    policy, part, _ = gaussian()
    rule = AWM(AWM.Settings(weight="elbo", inner_updates=2, anchor=0.0))
    (term, *_) = rule.plan(policy.schedule, 0, np.random.default_rng(0)).updates[0]
    loss = rule.loss(term, policy, part, Credit([np.ones(ROWS)] * STEPS), None)
    at = noised(term, policy, part)
    with torch.no_grad():
        now = rule._log_p(at, at.predicted(policy))
        with policy.shadow("old"):
            old = rule._log_p(at, at.predicted(policy))
    assert abs(now).max() > 1
    assert float(loss.gap) == pytest.approx(float((now - old).abs().max() / now.abs().max()), rel=1e-9)
