"""The learning rate by update."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffalign.backends.toy import ToyPolicy
from diffalign.rules import RULES
from diffalign.training.rates import factor
from tests.kit.helpers import toy_trainer


def test_a_constant_rate_is_exactly_itself():
    assert {factor("constant", k, 0, 10) for k in range(10)} == {1.0}


@given(st.sampled_from(["constant", "linear", "cosine"]), st.integers(0, 50), st.integers(1, 200))
def test_it_grows_to_its_height_and_never_again(schedule, warmup, updates):
    found = [factor(schedule, k, warmup, updates) for k in range(updates)]
    top = min(warmup, updates)
    assert all(a < b for a, b in itertools.pairwise(found[:top]))
    assert all(a >= b for a, b in itertools.pairwise(found[top:]))
    assert all(0 < value <= 1 for value in found)
    if warmup < updates:
        assert found[warmup] == 1.0


def test_it_falls_as_its_name_says():
    assert [factor("linear", k, 2, 6) for k in range(7)] == pytest.approx([1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25, 0])
    expected = [0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(5)]
    assert [factor("cosine", k, 0, 4) for k in range(5)] == pytest.approx(expected)


def test_the_optimizer_steps_with_it():
    """Plain gradient steps from one place: the way is as long as the rate."""
    rule = RULES["flow_grpo"]
    moved = []
    for rate in (0.5, 0.25):
        policy = ToyPolicy(process="flow_sde", noise_level=0.7)
        trainer = toy_trainer(rule(rule.Settings(window=None)), policy)
        trainer.optimizer = torch.optim.SGD(policy.parameters.values(), lr=1.0)
        trainer.rate = lambda update, rate=rate: rate
        before = policy.delta.detach().clone()
        metrics = trainer.update(0).metrics
        assert metrics["lr"] == rate
        moved.append(policy.delta.detach() - before)
    assert moved[0].abs().sum() > 0
    assert (moved[0] / moved[1]).numpy() == pytest.approx(2.0)
