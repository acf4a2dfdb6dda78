import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.ops import advantages

ALL = np.array([True] * 6)
GROUP = np.array([0, 0, 0, 7, 7, 7])


def test_T22_a_group_of_zero_and_one():
    found = advantages.group_relative(np.array([0.0, 1.0]), np.array([0, 0]), np.array([True, True]))
    np.testing.assert_allclose(found, [-0.9998, 0.9998], atol=1e-8)


def test_T23_constant_float32_groups_get_exactly_nothing():
    rewards = np.random.default_rng(0).normal(size=2000).astype(np.float32)
    found = advantages.group_relative(
        np.repeat(rewards, 24).astype(np.float64) / 3, np.repeat(np.arange(2000), 24), np.ones(48000, bool)
    )
    assert (found == 0).all()
    jitter = 0.1 + 1e-9 * np.random.default_rng(1).normal(size=24)  # a spread of rounding alone
    assert (advantages.group_relative(jitter, np.zeros(24, int), np.ones(24, bool)) == 0).all()
    tenths = advantages.group_relative(np.full(24, 0.1), np.zeros(24, int), np.ones(24, bool), scale="none")
    assert (tenths == 0).all()


@given(st.lists(st.floats(-10, 10), min_size=6, max_size=6), st.floats(0.5, 3), st.floats(-5, 5))
@settings(max_examples=100, deadline=None)
def test_T24_zero_sum_and_affine_invariance(values, scale, shift):
    rewards = np.array(values)
    found = advantages.group_relative(rewards, GROUP, ALL, eps=0.0, limit=1e9)
    for name in (0, 7):
        assert abs(found[name == GROUP].sum()) < 1e-9
    if all(np.ptp(rewards[name == GROUP]) > 1e-2 for name in (0, 7)):
        moved = advantages.group_relative(scale * rewards + shift, GROUP, ALL, eps=0.0, limit=1e9)
        np.testing.assert_allclose(moved, found, atol=1e-6)


def test_T25_batch_scale_divides_every_group_by_one_number():
    rewards = np.array([0.0, 1.0, 2.0, 0.0, 10.0, 20.0])
    found = advantages.group_relative(rewards, GROUP, ALL, scale="batch", eps=0.0)
    centred = rewards - np.repeat([1.0, 10.0], 3)
    np.testing.assert_allclose(found, centred / centred.std(), rtol=1e-12)


def test_clipped_at_the_limit():
    rewards = np.array([0.0] * 99 + [1.0])
    found = advantages.group_relative(rewards, np.zeros(100, int), np.ones(100, bool), limit=5.0)
    assert found.max() == 5.0


def test_invalid_scores_carry_no_weight():
    valid = np.array([True, True, False, True, True, True])
    found = advantages.group_relative(np.array([0.0, 1.0, 99.0, 1.0, 2.0, 3.0]), GROUP, valid)
    alone = advantages.group_relative(np.array([0.0, 1.0]), np.array([0, 0]), np.array([True, True]))
    np.testing.assert_array_equal(found[:2], alone)
    assert found[2] == 0
    loo = advantages.leave_one_out(np.array([0.0, 1.0, 99.0, 1.0, 2.0, 3.0]), GROUP, valid)
    np.testing.assert_allclose(loo, [-1, 1, 0, -1.5, 0, 1.5])


def test_a_valid_reward_must_be_finite():
    with pytest.raises(ValueError, match="not finite"):
        advantages.group_relative(np.array([np.nan, 1.0]), np.array([0, 0]), np.array([True, True]))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="differ"):
        advantages.leave_one_out(np.zeros(3), np.zeros(2, int), np.ones(3, bool))


def test_T34_leaves_average_to_their_parents():
    parent = [np.array([0, 0]), np.array([0, 0, 1, 1])]
    levels = advantages.average_to_parents(np.array([0.1, 0.4, 0.3, 0.9]), parent)
    np.testing.assert_allclose(levels[1], [0.25, 0.6])
    np.testing.assert_allclose(levels[0], [0.425])


def test_uneven_trees_weigh_leaves_equally():
    parent = [np.array([0, 0]), np.array([0, 1, 1, 1])]
    levels = advantages.average_to_parents(np.array([1.0, 0.0, 0.0, 0.0]), parent)
    np.testing.assert_allclose(levels[0], [0.25])
