import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from diffalign.ops import gaussian

generator = torch.Generator().manual_seed(0)
X, MEAN = (
    torch.randn(4, 3, 5, generator=generator, dtype=torch.float64),
    torch.randn(4, 3, 5, generator=generator, dtype=torch.float64),
)


@pytest.mark.parametrize(("reduce", "function"), [("mean", torch.Tensor.mean), ("sum", torch.Tensor.sum)])
def test_T11_log_prob_is_torchs(reduce, function):
    expected = function(Normal(MEAN, 0.3).log_prob(X).flatten(1), 1)
    torch.testing.assert_close(gaussian.log_prob(X, MEAN, 0.3, reduce), expected, rtol=1e-12, atol=1e-12)


def test_divergence_is_torchs():
    expected = kl_divergence(Normal(X, 0.7), Normal(MEAN, 0.7)).flatten(1).sum(1)
    torch.testing.assert_close(gaussian.divergence(X, MEAN, 0.7, "sum"), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", [gaussian.log_prob, gaussian.divergence])
def test_a_deterministic_step_has_no_density(function):
    with pytest.raises(ValueError, match="std is 0"):
        function(X, MEAN, 0.0, "mean")


def test_noise_cannot_be_borrowed_where_none_was_injected():
    with pytest.raises(ValueError, match="borrowed"):
        gaussian.score_inner(X, MEAN, 0.0)


def test_reduction_is_never_implicit():
    with pytest.raises(ValueError, match="allowed are mean, sum"):
        gaussian.reduce_latent(X, "max")


def test_invariant_3_score_surrogate_has_the_gradient_of_the_summed_log_prob():
    eps, std = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64), 0.4
    mean = MEAN.clone().requires_grad_()
    gaussian.score_inner(mean, eps, std).sum().backward()
    other = MEAN.clone().requires_grad_()
    stored = (other + std * eps).detach()
    gaussian.log_prob(stored, other, std, "sum").sum().backward()
    torch.testing.assert_close(mean.grad, other.grad, rtol=1e-12, atol=1e-12)


def test_T14_mean_reduced_log_ratio_of_a_shifted_mean():
    # log r = -m / (2 s^2) + <d, xi> / (D s): mean -K / D and standard deviation sqrt(2 K) / D with K = |d|^2 / (2 s^2)
    n, dim, std = 20_000, 64, 0.3
    shift = 0.02 * torch.randn(1, dim, generator=generator, dtype=torch.float64)
    xi = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    x, old = std * xi, torch.zeros(n, dim, dtype=torch.float64)
    log_ratio = gaussian.log_prob(x, old + shift, std, "mean") - gaussian.log_prob(x, old, std, "mean")
    k = float((shift**2).sum()) / (2 * std**2)
    z = float((log_ratio.mean() + k / dim) / (log_ratio.std() / math.sqrt(n)))
    assert abs(z) < 4
    assert float(log_ratio.std()) == pytest.approx(math.sqrt(2 * k) / dim, rel=0.02)
