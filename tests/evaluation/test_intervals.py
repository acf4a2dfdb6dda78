"""Intervals against published widths, closed forms, and simulations of what they cover."""

import math

import numpy as np
import pytest
from scipy import stats

from diffalign.evaluation import intervals as s

PROMPTS = np.repeat(np.arange(24), 4)


def test_wilson_has_the_published_width():
    """p = 0.95 of 553: 0.929 to 0.965; of 2212: 0.940 to 0.958."""
    for n, low, high in ((553, 0.929, 0.965), (2212, 0.940, 0.958)):
        values = np.zeros(n)
        values[: round(0.95 * n)] = 1
        found = s.wilson(values, np.arange(n))
        assert (found.low, found.high) == pytest.approx((low, high), abs=2e-3)  # 0.95 n is no whole number


def test_wilson_is_scipy_s_for_many_independent_samples():
    """Student's t for 3,000 samples is the normal's to four digits."""
    values = np.array([1.0] * 700 + [0.0] * 2300)
    expected = stats.binomtest(700, 3000).proportion_ci(method="wilson")
    found = s.wilson(values, np.arange(3000))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-3)


def test_copies_of_a_sample_are_worth_no_more_than_it():
    values = np.arange(40) % 3 == 0
    once = s.wilson(values.astype(float), np.arange(40))
    copied = s.wilson(np.repeat(values, 8).astype(float), np.repeat(np.arange(40), 8))
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high), rel=1e-9)


def test_verdicts_that_are_all_equal_claim_no_more_than_their_prompts():
    """8 prompts x 24 zeros: likeness within prompts cannot be told, so n is 8, and the top 0.324."""
    found = s.mean(np.zeros(192), np.repeat(np.arange(8), 24))
    assert found.low == 0.0
    assert found.high == pytest.approx(0.324, abs=5e-4)
    ones = s.mean(np.ones(192), np.repeat(np.arange(8), 24))
    assert (ones.low, ones.high) == (pytest.approx(1 - found.high), 1.0)


@pytest.mark.parametrize("count", range(1, 8))
@pytest.mark.parametrize("values", ["verdicts", "scores", "equal"])
def test_too_few_prompts_have_no_interval_and_the_text_says_so(count, values):
    prompt = np.repeat(np.arange(count), 6)
    rng = np.random.default_rng(0)
    given = {"verdicts": rng.integers(0, 2, 6 * count) * 1.0, "scores": rng.normal(size=6 * count), "equal": 0 * prompt}
    for found in (s.mean(given[values] * 1.0, prompt), s.gain(given[values] * 1.0, np.zeros(6 * count), prompt)):
        assert not found.known
        assert found.text().endswith("(too few prompts for an interval)")
        assert found.facts() == {"mean": found.value, "low": None, "high": None}


def test_equal_pairs_do_not_claim_that_nothing_changes():
    """30 equal pairs: up and down once each in 32, +- 1.96 sqrt(2 / 32 / 32)."""
    same = np.arange(30) % 2 * 1.0
    found = s.gain(same, same, np.arange(30))
    assert found.value == 0
    assert (found.low, found.high) == pytest.approx((-1.96 * math.sqrt(2) / 32, 1.96 * math.sqrt(2) / 32), rel=1e-3)


def test_scores_without_spread_have_no_interval():
    assert not s.mean(np.full(96, 0.3), PROMPTS).known
    assert not s.hall(np.full(96, 0.1) + 1e-17, PROMPTS).known


def test_missing_scores_are_left_out_and_prompts_may_have_unequal_numbers():
    rng = np.random.default_rng(0)
    values = rng.normal(size=96)
    values[[1, 5, 6, 7, 50]] = np.nan
    found = s.mean(values, PROMPTS)
    assert found.value == pytest.approx(np.nanmean(values))
    assert found.low < found.value < found.high
    nothing = s.mean(np.full(96, np.nan), PROMPTS)
    assert math.isnan(nothing.value)
    assert not nothing.known


def test_hall_is_students_where_nothing_is_skewed():
    values = np.concatenate([-np.arange(1, 13), np.arange(1, 13)]) * 1.0
    found = s.hall(values, np.arange(24))
    expected = stats.t.interval(0.95, 23, 0, stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected, rel=1e-9)


# -- coverage: shares of REPEATS evaluations whose interval holds the truth

REPEATS = 2000
DEVIATION = math.sqrt(0.05 * 0.95 / REPEATS)  # of a share around 95 %


def likely(rng, p: float, likeness: float, prompts: int, images: int) -> np.ndarray:
    """Verdicts (prompts * images,) with that mean and intraclass correlation."""
    if likeness == 0:
        return rng.binomial(1, p, prompts * images).astype(float)
    chance = rng.beta(p * (1 - likeness) / likeness, (1 - p) * (1 - likeness) / likeness, prompts)
    return (rng.random((prompts, images)) < chance[:, None]).astype(float).ravel()


@pytest.mark.parametrize(
    ("p", "likeness", "prompts", "images"),
    [
        (0.5, 0.0, 24, 4),
        (0.5, 0.3, 24, 4),
        (0.2, 0.5, 24, 32),
        (0.05, 0.5, 24, 32),  # the plain design effect: 0.84
        (0.05, 0.5, 8, 24),  # 0.87
        (0.05, 0.9, 24, 32),  # 0.90
        (0.02, 0.5, 100, 32),  # 0.89
        (0.1, 0.0, 200, 1),
        (0.95, 0.3, 100, 4),
    ],
)
def test_means_of_verdicts_are_covered(p, likeness, prompts, images):
    rng, prompt, hits = np.random.default_rng(0), np.repeat(np.arange(prompts), images), 0
    for _ in range(REPEATS):
        found = s.mean(likely(rng, p, likeness, prompts, images), prompt)
        hits += found.low <= p <= found.high
    # 95 %; where events are rare it is the discreteness of few prompts that makes it more
    assert 0.95 - 4 * DEVIATION < hits / REPEATS < (0.99 if p <= 0.05 else 0.97 + 3 * DEVIATION)


@pytest.mark.parametrize(
    ("up", "down", "likeness", "prompts", "images"),
    [
        (0.1, 0.0, 0.0, 30, 1),  # Student's t on the differences: 0.93, and 4 % of [0, 0]
        (0.5, 0.02, 0.2, 24, 4),
        (0.2, 0.1, 0.5, 24, 32),
        (0.9, 0.0, 0.2, 24, 32),  # 0.91
        (0.1, 0.02, 0.5, 100, 4),
        (0.02, 0.0, 0.2, 24, 32),  # 0.78
    ],
)
def test_gains_of_verdicts_are_covered(up, down, likeness, prompts, images):
    rng, prompt, hits = np.random.default_rng(1), np.repeat(np.arange(prompts), images), 0
    for _ in range(REPEATS):
        chances = np.tile([up, down, 1 - up - down], (prompts, 1))
        if likeness:
            chances = rng.dirichlet(np.maximum(chances[0], 1e-9) * (1 - likeness) / likeness, prompts)
        drawn = rng.random((prompts, images))
        rose = drawn < chances[:, :1]
        fell = ~rose & (drawn < chances[:, :2].sum(1, keepdims=True))
        before = np.where(rose, 0.0, np.where(fell, 1.0, (rng.random(drawn.shape) < 0.5) * 1.0))
        after = np.where(rose, 1.0, np.where(fell, 0.0, before))
        found = s.gain(after.ravel(), before.ravel(), prompt)
        hits += found.low <= up - down <= found.high
    # with few discordant prompts nothing is known of their likeness, and each is one: more is covered than is claimed
    assert hits / REPEATS > 0.95 - 4 * DEVIATION
    assert min(up, 1 - up) * prompts < 8 or hits / REPEATS < 0.985


DRAWS = {
    "normal": lambda rng, n: rng.normal(size=n),
    "skewed": lambda rng, n: rng.exponential(size=n) - 1,  # Student's t: 0.89 at 8 prompts
    "two-sided": lambda rng, n: rng.beta(0.5, 0.5, n) - 0.5,
    "mostly low": lambda rng, n: rng.beta(0.2, 0.8, n) - 0.2,  # 0.87
}


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("prompts", [8, 24, 100])
def test_means_of_scores_are_covered(kind, prompts):
    rng, hits = np.random.default_rng(2), 0
    for _ in range(REPEATS):
        found = s.mean(DRAWS[kind](rng, prompts), np.arange(prompts))
        hits += found.low <= 0 <= found.high
    assert 0.925 < hits / REPEATS < 0.99  # 0.94 (skewed) to 0.98 (two-sided) at 8 prompts, nearer to 0.95 at more


@pytest.mark.parametrize("chances", [[0.98, 0.9, 0.6, 0.8, 0.15, 0.3], [0.05] * 6, [0.4] * 3])
@pytest.mark.parametrize(("prompts", "likeness"), [(4, 0.3), (12, 0.9), (80, 0.3)])
def test_overall_scores_are_covered(chances, prompts, likeness):
    rng, hits, count = np.random.default_rng(3), 0, len(chances)
    task = np.repeat(np.arange(count), prompts * 4)
    prompt = np.repeat(np.arange(count * prompts), 4)
    for _ in range(1000):
        values = np.concatenate([likely(rng, p, likeness, prompts, 4) for p in chances])
        found = s.mean_of_means(values, prompt, task)
        hits += found.low <= np.mean(chances) <= found.high
    assert hits / 1000 > 0.95 - 4 * math.sqrt(0.05 * 0.95 / 1000)  # more where chances are near 0 and prompts few
    assert prompts < 80 or hits / 1000 < 0.98


STRATA = np.repeat(np.arange(6), [4 * n for n in (8, 30, 12, 50, 20, 10)])  # four pictures a prompt
OF_STRATA = np.repeat(np.arange(130), 4)


def stratified(rng, kind):
    """Scores whose prompts differ more than the pictures of one, and more in some strata; their mean of means is 0.5."""
    prompts = DRAWS[kind](rng, 130) * (1 + np.arange(130) % 3)
    return prompts[OF_STRATA] + rng.normal(size=520) * 0.3 + STRATA / 5


@pytest.mark.parametrize("kind", ["normal", "skewed", "mostly low"])
def test_means_of_categories_are_covered_over_prompts_in_strata(kind):
    """Over pictures instead, 0.62 to 0.67 would be."""
    rng, hits, over_pictures = np.random.default_rng(7), 0, 0
    for _ in range(1000):
        values = stratified(rng, kind)
        found = s.mean_of_means(values, OF_STRATA, STRATA)
        hits += found.low <= 0.5 <= found.high
        wrong = s.mean_of_means(values, np.arange(520), STRATA)
        over_pictures += wrong.low <= 0.5 <= wrong.high
    assert 0.92 < hits / 1000 < 0.98
    assert over_pictures / 1000 < 0.85


def test_the_interval_of_means_of_categories_is_a_bootstraps_in_strata():
    """Its half-width is 1.98 (Student's, 90 degrees of freedom) standard deviations of means over prompts drawn again in each stratum."""
    rng = np.random.default_rng(0)
    values = stratified(rng, "normal")
    drawn = []
    by_prompt = values.reshape(130, 4).mean(1)
    stratum = STRATA[::4]
    for _ in range(4000):
        means = [rng.choice(by_prompt[stratum == k], (stratum == k).sum()).mean() for k in range(6)]
        drawn.append(np.mean(means))
    found = s.mean_of_means(values, OF_STRATA, STRATA)
    # 2 % of sampling, and (n - 1) / n of a bootstrap's variance, of which 8 prompts have most
    assert (found.high - found.low) / 2 == pytest.approx(1.98 * np.std(drawn), rel=0.08)


def test_the_overall_score_is_the_mean_of_the_tasks_not_of_the_samples():
    values = np.array([1.0] * 10 + [0.0] * 2)
    task = np.array([0] * 10 + [1] * 2)
    found = s.mean_of_means(values, np.arange(12), task)
    assert found.value == 0.5
    assert found.low < 0.5 < found.high
    rng = np.random.default_rng(0)
    values = rng.normal(size=400)
    found = s.mean_of_means(values, np.arange(400), np.arange(400) % 2)
    half = 1.96 * np.sqrt(values[::2].var() / 200 + values[1::2].var() / 200) / 2
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.02)
    assert not s.mean_of_means(values[:9], np.arange(9), np.array([0] * 8 + [1])).known  # one prompt says nothing


def test_small_numbers_are_not_printed_as_zeros():
    assert s.Interval(-4.9e-6, -6e-6, -1e-6).text("+.3f") == "-0.0000049 [-0.0000060, -0.0000010]"
    assert s.Interval(0.0041, 0.001, 0.007).text() == "0.0041 [0.0010, 0.0070]"
    assert s.Interval(0.0, 0.0, 0.0).text() == "0.000 [0.000, 0.000]"
    assert s.Interval(0.004, -0.1, 0.1).text() == "0.004 [-0.100, 0.100]"
