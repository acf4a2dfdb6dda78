import math

import pytest
import torch

from diffalign.ops import matching

G = torch.Generator().manual_seed(0)
X0, NOISE = (torch.randn(3, 2, 4, generator=G, dtype=torch.float64) for _ in range(2))


def levels(prediction: str, t: float) -> tuple[float, float]:
    return (1 - t, t) if prediction == "velocity" else (math.cos(t), math.sin(t))


@pytest.mark.parametrize("prediction", ["velocity", "epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_a_perfect_prediction_implies_the_clean_sample(prediction, t):
    alpha, sigma = levels(prediction, t)
    x = matching.noised(X0, NOISE, alpha, sigma)
    target = matching.target(X0, NOISE, alpha, sigma, prediction)
    torch.testing.assert_close(matching.clean(x, target, alpha, sigma, prediction), X0, rtol=1e-12, atol=1e-12)


def test_the_velocity_is_the_slope_of_the_path():
    h = 1e-6
    ends = [matching.noised(X0, NOISE, 1 - t, t) for t in (0.3 - h, 0.3 + h)]
    slope = matching.target(X0, NOISE, 0.7, 0.3, "velocity")
    torch.testing.assert_close((ends[1] - ends[0]) / (2 * h), slope, atol=1e-8, rtol=0)


def test_the_v_of_ddpm_is_the_slope_of_the_angle():
    h = 1e-6
    ends = [matching.noised(X0, NOISE, math.cos(a), math.sin(a)) for a in (0.4 - h, 0.4 + h)]
    slope = matching.target(X0, NOISE, math.cos(0.4), math.sin(0.4), "v_prediction")
    torch.testing.assert_close((ends[1] - ends[0]) / (2 * h), slope, atol=1e-8, rtol=0)


def test_invariant_15_ghuber_of_power_one_is_t_and_bounds_grow_slower():
    ell = torch.tensor([0.0, 0.5, 4.0, 1e6], dtype=torch.float64)
    torch.testing.assert_close(matching.weighted(ell, 0.3, "ghuber", 1.0), 0.3 * ell, rtol=1e-9, atol=1e-9)
    assert matching.weighted(ell, 0.3, "uniform").equal(ell)
    torch.testing.assert_close(matching.weighted(ell, 0.3, "t2"), 0.09 * ell)
    huber, ghuber = (matching.weighted(ell, 0.3, kind) for kind in ("huber", "ghuber"))
    assert huber[0].abs() < 1e-12
    assert ghuber[0].abs() < 1e-12
    assert huber[-1] < 1e-2 * 0.3 * ell[-1]
    assert ghuber[-1] < 0.2 * huber[-1]
