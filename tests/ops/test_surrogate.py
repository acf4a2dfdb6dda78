import math

import pytest
import torch

from diffalign.ops import surrogate


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "slope"),
    [(1, 1.2, -1.1, 0), (1, 0.8, -0.8, -1), (-1, 1.2, 1.2, 1), (-1, 0.8, 0.9, 0)],
)
def test_T15_sign_table_at_clip_one_tenth(advantage, ratio, loss, slope):
    log_ratio = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    value = surrogate.clipped(log_ratio, torch.tensor([float(advantage)], dtype=torch.float64), 0.1)
    value.sum().backward()
    assert value.item() == pytest.approx(loss, abs=1e-12)
    assert log_ratio.grad.item() / ratio == pytest.approx(slope, abs=1e-12)


def test_T16_on_policy_gradient_is_minus_advantage():
    log_ratio = torch.zeros(3, requires_grad=True)
    surrogate.clipped(log_ratio, torch.tensor([1.0, -2.0, 0.5]), 1e-4).sum().backward()
    assert log_ratio.grad.tolist() == [-1.0, 2.0, -0.5]


def test_clip_fractions_count_each_side():
    low, high = surrogate.clip_fraction(torch.tensor([-0.3, -0.05, 0.0, 0.3]), 0.1)
    assert (low.item(), high.item()) == (0.25, 0.25)
    low, high = surrogate.clip_fraction(torch.tensor([-0.3, -0.2, 0.0, 0.3]), 0.1)
    assert (low.item(), high.item()) == (0.5, 0.25)
