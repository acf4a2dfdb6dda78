"""What is said of seeds, held against scipy's own tests, examples worked by hand, and simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from diffalign.comparing import statistics
from diffalign.comparing.statistics import Cost

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_a_mean_over_seeds_has_students_interval(seeds):
    values = RNG.normal(0.1, 0.03, seeds)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert statistics.over_seeds(values).ends == pytest.approx((expected.low, expected.high))


def test_one_seed_or_equal_ones_claim_no_interval():
    assert not statistics.over_seeds(np.array([0.3])).known
    assert statistics.over_seeds(np.array([0.3, 0.3, 0.3])).value == pytest.approx(0.3)
    assert not statistics.over_seeds(np.array([0.3, 0.3, 0.3])).known
    assert math.isnan(statistics.over_seeds(np.array([])).value)


@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_a_difference_is_the_paired_t_test(seeds):
    shared = RNG.normal(0, 1, seeds)  # what a seed does to both falls out
    own, other = (shared + RNG.normal(shift, 0.05, seeds) for shift in (0.55, 0.5))
    expected = stats.ttest_rel(own, other)
    found = statistics.difference(own, other)
    interval = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue)
    assert found.value.ends == pytest.approx((interval.low, interval.high))
    assert found.half == pytest.approx((interval.high - interval.low) / 2)
    assert found.seeds == seeds


def test_seeds_without_a_score_do_not_count():
    found = statistics.difference(np.array([0.5, np.nan, 0.7]), np.array([0.4, 0.2, 0.5]))
    assert (found.seeds, found.value.value) == (2, pytest.approx(0.15))
    one = statistics.difference(np.array([0.5]), np.array([0.4]))
    assert (one.seeds, one.value.known, math.isnan(one.p)) == (1, False, True)
    equal = statistics.difference(np.array([0.5, 0.6]), np.array([0.5, 0.6]))
    assert (equal.value.value, equal.value.known, math.isnan(equal.p)) == (0, False, True)


@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_the_difference_that_four_of_five_comparisons_find(seeds):
    count = 40_000
    error = 0.3 / math.sqrt(seeds)
    values = RNG.normal(statistics.power_shift(seeds) * error, 0.3, (count, seeds))
    t = values.mean(1) / (values.std(1, ddof=1) / math.sqrt(seeds))
    share = (t > stats.t.ppf(0.975, seeds - 1)).mean()
    assert abs(share - 0.8) < 4 * math.sqrt(0.16 / count)  # four standard errors of a share


def test_holm_by_hand():
    # 0.005 * 4, 0.01 * 3, 0.03 * 2, and 0.04 is not below the one before it
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.6, math.nan, 0.7])[::2] == [1.0, 1.0]
    assert math.isnan(statistics.holm([0.6, math.nan])[1])
    assert statistics.holm([]) == []


def test_prompts_alone():
    prompt = np.repeat(np.arange(200), [1, 3] * 100)
    effect = RNG.exponential(1.0, 200)
    change = effect[prompt] + RNG.normal(0, 0.1, (3, len(prompt)))
    change[0, 5], change[:, prompt == 7] = np.nan, np.nan
    means = [np.nanmean(change[:, prompt == k]) for k in range(200) if k != 7]
    np.testing.assert_allclose(statistics.by_prompt(change, prompt), means)
    found = statistics.over_prompts(change, prompt)
    assert found == statistics.over_prompts(change, prompt)
    normal = 1.96 * np.std(means, ddof=1) / math.sqrt(199)
    # A bootstrap of 2,000 and its correction of skewness move an end by a few percent of the half-width.
    assert found.ends == pytest.approx((np.mean(means) - normal, np.mean(means) + normal), abs=0.2 * normal)
    assert found.ends[1] - np.mean(means) > np.mean(means) - found.ends[0], "skewed as the prompts are"
    assert not statistics.over_prompts(change[:, :10], prompt[:10]).known  # too few prompts


def test_what_a_score_costs():
    spent, score = [0.0, 100.0, 200.0, 400.0], [0.1, 0.2, 0.15, 0.4]
    assert statistics.reached(spent, score, 0.15) == pytest.approx(np.interp(0.15, score[:2], spent[:2]))
    assert statistics.reached(spent, score, 0.3) == pytest.approx(320)
    assert statistics.reached(spent, score, 0.4) == 400
    assert statistics.reached(spent, score, 0.05) == 0
    assert statistics.reached(spent, score, 0.41) is None
    assert statistics.cost([30.0, 10.0, 20.0]) == Cost(3, 3, 20.0, 10.0, 30.0)
    assert statistics.cost([30.0, None, 20.0]) == Cost(3, 2, 30.0, 20.0, 30.0)
    assert statistics.cost([None, None, 20.0]) == Cost(3, 1, None, 20.0, 20.0)
    assert statistics.cost([None]) == Cost(1, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 8])
@pytest.mark.parametrize(("of_seed", "of_prompt"), [(0.05, 0.0), (0.02, 0.3), (0.0, 0.3)])
def test_intervals_cover_what_they_claim(seeds, of_seed, of_prompt):
    """The truth is the mean over all seeds on the prompts there are; every seed moves all prompts, and each prompt in its own way."""
    rng, count, prompts = np.random.default_rng(seeds), 4000, 32
    held = dict.fromkeys(("gain", "difference"), 0)
    for _ in range(count):
        truth = rng.normal(0.1, of_prompt, (2, prompts))
        own = truth[:, None] + rng.normal(0, of_seed, (2, seeds, 1)) + rng.normal(0, 0.2, (2, seeds, prompts))
        means = own.mean(2)
        low, high = statistics.over_seeds(means[0]).ends
        held["gain"] += low <= truth[0].mean() <= high
        low, high = statistics.difference(means[0], means[1]).value.ends
        held["difference"] += low <= (truth[0] - truth[1]).mean() <= high
    assert all(0.93 < value / count < 0.97 for value in held.values()), held
