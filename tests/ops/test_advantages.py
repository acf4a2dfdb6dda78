import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.ops import advantages

ALL = np.array([True] * 6)
GROUP = np.array([0, 0, 0, 7, 7, 7])


def test_T22_a_group_of_zero_and_one():
    found = advantages.group_relative(np.array([0.0, 1.0]), np.array([0, 0]), np.array([True, True]))
    # Published code adds 1e-4 to the standard deviation (0.9998): a reward in other units would have other advantages.
    np.testing.assert_array_equal(found, [-1, 1])


def test_T23_constant_float32_groups_get_exactly_nothing():
    rewards = np.random.default_rng(0).normal(size=2000).astype(np.float32)
    found = advantages.group_relative(
        np.repeat(rewards, 24).astype(np.float64) / 3, np.repeat(np.arange(2000), 24), np.ones(48000, bool)
    )
    assert (found == 0).all()
    ulps = np.random.default_rng(1).integers(-1, 2, 24)  # a spread of rounding alone
    for one, kind in ((np.float32(0.1), np.float32), (np.float64(0.1), np.float64)):
        jitter = (one + ulps * np.spacing(one)).astype(kind).astype(np.float64)
        assert (advantages.group_relative(jitter, np.zeros(24, int), np.ones(24, bool)) == 0).all()
    tenths = advantages.group_relative(np.full(24, 0.1), np.zeros(24, int), np.ones(24, bool), scale="none")
    assert (tenths == 0).all()


@given(st.lists(st.floats(-10, 10), min_size=6, max_size=6), st.floats(0.5, 3), st.floats(-5, 5))
@settings(max_examples=100, deadline=None)
def test_T24_zero_sum_and_affine_invariance(values, scale, shift):
    rewards = np.array(values)
    found = advantages.group_relative(rewards, GROUP, ALL, limit=1e9)
    for name in (0, 7):
        assert abs(found[name == GROUP].sum()) < 1e-9
    if all(np.ptp(rewards[name == GROUP]) > 1e-2 for name in (0, 7)):
        moved = advantages.group_relative(scale * rewards + shift, GROUP, ALL, limit=1e9)
        np.testing.assert_allclose(moved, found, atol=1e-6)


def test_T25_batch_scale_divides_every_group_by_one_number():
    rewards = np.array([0.0, 1.0, 2.0, 0.0, 10.0, 20.0])
    found = advantages.group_relative(rewards, GROUP, ALL, scale="batch")
    centred = rewards - np.repeat([1.0, 10.0], 3)
    # of all rewards, as published code has it, and not of the centred ones
    np.testing.assert_allclose(found, centred / rewards.std(), rtol=1e-12)


@pytest.mark.parametrize("scale", ["group", "batch"])
@pytest.mark.parametrize("baseline", ["group", "leave_one_out"])
@given(
    st.lists(st.integers(-1000, 1000), min_size=6, max_size=6),
    st.sampled_from([1e-30, 1e-7, 1e-4, 1.0, 1e6, 1e30]),
    st.sampled_from([0.0, 1e3, -1e6, 1e8]),
)
@settings(max_examples=50, deadline=None)
def test_advantages_depend_neither_on_a_rewards_scale_nor_on_its_offset(scale, baseline, values, factor, offset):
    """1e6 +- 0.1 as much as 0 +- 0.1; a step of 1e-3 among 1e8 is still 1e4 roundings of float64."""
    rewards = np.array(values) / 1000
    found = advantages.group_relative(rewards, GROUP, ALL, scale, baseline=baseline)
    moved = advantages.group_relative(factor * (rewards + offset / 3), GROUP, ALL, scale, baseline=baseline)
    np.testing.assert_allclose(moved, found, atol=1e-4)


def test_leaving_one_out_is_scaled_and_limited_as_the_mean_is():
    rewards = np.array([0.0, *[0.95] * 7])
    group, valid = np.zeros(8, int), np.ones(8, bool)
    found = advantages.group_relative(rewards, group, valid, baseline="leave_one_out", limit=10.0)
    # r - mean of the others = (r - mean) 8 / 7, over the group's std: the others' own would be 0
    np.testing.assert_allclose(found, (rewards - rewards.mean()) * 8 / 7 / rewards.std())
    limited = advantages.group_relative(rewards, group, valid, baseline="leave_one_out", limit=0.5)
    assert np.abs(limited).max() == 0.5
    plain = advantages.group_relative(rewards, group, valid, "none", baseline="leave_one_out")
    np.testing.assert_allclose(plain, advantages.leave_one_out(rewards, group, valid))


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


def test_bundles_add_up_the_samples_of_several_groups():
    reward = np.array([1.0, 2.0, 3.0, 10.0, 20.0, 30.0, 4.0, 5.0, 6.0, 40.0, 50.0, 60.0])
    group = np.array([0, 0, 0, 1, 1, 1, 5, 5, 5, 7, 7, 7])
    valid = np.ones(12, bool)
    valid[4] = False
    score, name, whole = advantages.bundled(reward, group, valid, 2)
    np.testing.assert_array_equal(score[[0, 2, 3, 5, 6, 7, 8]], [11, 33, 11, 33, 44, 55, 66])
    np.testing.assert_array_equal(name, [0] * 6 + [1] * 6)
    np.testing.assert_array_equal(whole, [True, False, True] * 2 + [True] * 6)
    one = advantages.bundled(reward, group, valid, 1)
    np.testing.assert_array_equal(one[0][valid], reward[valid])
    np.testing.assert_array_equal(np.unique(one[1]), [0, 1, 2, 3])


@pytest.mark.parametrize(("group", "size"), [([0, 0, 1, 1, 2, 2], 2), ([0, 0, 0, 1, 1, 2], 1)])
def test_bundles_that_do_not_come_out_are_refused(group, size):
    with pytest.raises(ValueError, match="bundles of"):
        advantages.bundled(np.zeros(6), np.array(group), ALL, size)


@pytest.mark.parametrize(
    ("low", "high", "weight"), [(0.2, 0.9, 1.5), (0.4, 0.6, 0.0), (0.1, 1.0, 3.0), (0.5, 0.8, 1.0)]
)
def test_the_policy_gradient_of_a_reward_at_risk_is_that_of_the_mixed_value_at_risk(low, high, weight):
    """For r ~ N(m, s^2), J = m + c s with c from the normal's quantile function: dJ/dm = 1, dJ/ds = c."""
    from statistics import NormalDist

    def mean_quantile(a: float, b: float) -> float:
        points = a + (b - a) * (np.arange(20_000) + 0.5) / 20_000
        return float(np.mean([NormalDist().inv_cdf(p) for p in points]))

    c = (weight * mean_quantile(0, low) + mean_quantile(low, high)) / (weight + 1)
    m, s, batch = 0.3, 1.7, 4000
    slopes = []  # of batches, whose spread has that of their quantiles in it
    for z in np.random.default_rng(0).normal(size=(200, batch)):
        found = advantages.at_risk(m + s * z, np.ones(batch, bool), low, high, weight)
        assert found.max() <= 0
        centred = found - found.mean()
        slopes.append([(centred * z / s).mean(), (centred * (z**2 - 1) / s).mean()])
    error = np.std(slopes, 0) / np.sqrt(len(slopes))
    assert (abs(np.mean(slopes, 0) - [1.0, c]) < 4.5 * error).all()
    assert (error < 0.01).all()


def test_invalid_rewards_are_at_no_risk():
    valid = np.array([True, True, False, True])
    found = advantages.at_risk(np.array([0.0, 1.0, np.nan, 2.0]), valid, 0.4, 0.9, 1.0)
    assert found[2] == 0
    # quantiles of the valid ones: 1 and 2; tail -(1 - 0) / 0.4, middle (clip(r, 1, 2) - 2) / 0.5
    np.testing.assert_allclose(found[[0, 1, 3]], [(-2.5 - 2) / 2, -2 / 2, 0])
    assert (advantages.at_risk(np.zeros(2), np.zeros(2, bool), 0.4, 0.9, 1.0) == 0).all()


def test_group_numbers_of_any_size_are_told_apart():
    """In float32, 2^24 and 2^24 + 1 are one number."""
    reward, valid = np.array([0.0, 1.0, 2.0, 5.0]), np.ones(4, bool)
    large = np.array([2**24, 2**24, 2**24 + 1, 2**24 + 1])
    for scale in ("group", "batch", "none"):
        small = advantages.group_relative(reward, np.array([0, 0, 1, 1]), valid, scale)
        assert np.array_equal(advantages.group_relative(reward, large, valid, scale), small)
    assert np.array_equal(
        advantages.leave_one_out(reward, large, valid), advantages.leave_one_out(reward, np.array([0, 0, 1, 1]), valid)
    )


def test_gdpo_leaves_exactly_nothing_to_what_no_reward_tells_apart():
    parts = [np.array([1.0, 3.0, 0.0, 0.0]), np.array([1.0, 0.0, 0.0, 9.0])]
    found = advantages.decoupled(parts, np.array([True, True, True, False]))
    total = np.array([2.0, 3.0, 0.0])  # whose mean counts the flat sample, and not the one without a score
    np.testing.assert_allclose(found[:2], ((total - total.mean()) / total.std())[:2], rtol=1e-12)
    np.testing.assert_array_equal(found[2:], 0)


def test_R12_a_soft_limit_has_slope_one_at_zero_and_infinity_is_none():
    values = np.random.default_rng(0).normal(size=50)
    assert advantages.softened(values, np.inf) is values
    small = 1e-4 * values
    np.testing.assert_allclose(advantages.softened(small, 3.0), small, rtol=1e-8)  # A^3 / (3 limit^2) is left
    assert (np.abs(advantages.softened(100 * values, 3.0)) <= 3).all()
    assert (np.diff(advantages.softened(np.sort(values), 3.0)) > 0).all()


def test_R14_softmax_advantages_sum_to_zero_whatever_is_added():
    rng = np.random.default_rng(1)
    reward, group = rng.normal(size=32), np.repeat(np.arange(4), 8)
    valid = np.ones(32, bool)
    valid[3] = False
    found = advantages.softmax_relative(reward, group, valid, 50.0)
    for rows in range(4):
        mine = valid & (group == rows)
        share = np.exp(reward[mine] / reward[valid].std())
        np.testing.assert_allclose(found[mine], share / share.mean() - 1, rtol=1e-12)
        assert abs(found[mine].sum()) < 1e-12
    assert found[3] == 0
    moved = advantages.softmax_relative(reward + 0.25, group, valid, 50.0)
    np.testing.assert_allclose(moved, found, rtol=1e-9)
    np.testing.assert_allclose(advantages.softmax_relative(7 * reward, group, valid, 50.0), found, rtol=1e-9)
    assert advantages.softmax_relative(reward, group, valid, 0.5).max() == 0.5


def test_R14_equal_rewards_are_finite():
    group, valid = np.repeat([0, 1], 4), np.ones(8, bool)
    equal = np.full(8, 0.3, np.float32).astype(float)
    assert not advantages.softmax_relative(equal, group, valid).any()
    assert not advantages.softmax_relative(equal, group, np.zeros(8, bool)).any()
    nearly = np.array(
        [0.5, 0.5, 0.5, 0.5 + 1e-9, 0.5, 0.5, 0.5, 0.5]
    )  # a spread of 3e-10: by that it would be e^3 apart
    found = advantages.softmax_relative(nearly, group, valid)
    assert np.isfinite(found).all()
    assert 0 < abs(found).max() < 1e-2
