"""Intervals against published widths, simulation and closed forms."""

import numpy as np
import pytest

from diffalign.evaluation import intervals as s


def test_wilson_has_the_published_width():
    """p = 0.95 of 553: 0.929 to 0.965; of 2212: 0.940 to 0.958."""
    for n, low, high in ((553, 0.929, 0.965), (2212, 0.940, 0.958)):
        values = np.zeros(n)
        values[: round(0.95 * n)] = 1
        found = s.wilson(values, np.arange(n))
        assert (found.low, found.high) == pytest.approx((low, high), abs=2e-3)  # 0.95 n is no whole number


def test_wilson_is_scipy_s_for_independent_samples():
    from scipy import stats

    values = np.array([1.0] * 7 + [0.0] * 23)
    expected = stats.binomtest(7, 30).proportion_ci(method="wilson")
    found = s.wilson(values, np.arange(30))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)


def test_copies_of_a_sample_are_worth_no_more_than_it():
    values = np.array([0.0, 1.0, 1.0, 0.0, 1.0])
    once = s.wilson(values, np.arange(5))
    copied = s.wilson(np.repeat(values, 8), np.repeat(np.arange(5), 8))
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high), rel=1e-9)


def test_the_interval_covers_the_truth_where_samples_of_a_prompt_are_alike():
    """200 evaluations of 60 prompts x 4 whose chances of success are Beta(1, 1): the plain interval would cover 75 % of them."""
    rng = np.random.default_rng(0)
    prompt, hits, plain = np.repeat(np.arange(60), 4), 0, 0
    for _ in range(200):
        values = (rng.random(240) < np.repeat(rng.beta(1, 1, 60), 4)).astype(float)
        found = s.wilson(values, prompt)
        hits += found.low <= 0.5 <= found.high
        naive = s.wilson(values, np.arange(240))
        plain += naive.low <= 0.5 <= naive.high
    # 95 % of 200 is 190 with a standard deviation of 3.1
    assert abs(hits - 190) < 4 * 3.1
    assert plain < 180


def test_verdicts_get_wilson_and_scores_a_bootstrap():
    prompt = np.repeat(np.arange(10), 2)
    verdicts, scores = np.tile([0.0, 1.0], 10), np.linspace(0, 1, 20)
    assert s.mean(verdicts, prompt) == s.wilson(verdicts, prompt)
    assert s.mean(scores, prompt) == s.interval(scores, prompt)
    holes = verdicts.copy()
    holes[3] = np.nan
    assert s.mean(holes, prompt).value == pytest.approx(np.nanmean(holes))


def test_the_overall_score_is_the_mean_of_the_tasks_not_of_the_samples():
    values = np.array([1.0] * 10 + [0.0] * 2)
    task = np.array([0] * 10 + [1] * 2)
    found = s.mean_of_means(values, np.arange(12), task)
    assert found.value == 0.5
    assert (found.low, found.high) == (0.5, 0.5)
    rng = np.random.default_rng(0)
    values = rng.normal(size=400)
    found = s.mean_of_means(values, np.arange(400), np.arange(400) % 2)
    half = 1.96 * np.sqrt(values[::2].var() / 200 + values[1::2].var() / 200) / 2
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)


def test_thumbnails_keep_means_of_blocks():
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 64, 3), dtype=np.uint8)
    small = s.thumbnails(frames).reshape(2, 3, 16, 16, 3)
    assert small[1, 2, 0, 1] == pytest.approx(frames[1, 2, 0:2, 4:8].mean((0, 1)) / 255)
    assert s.thumbnails(frames[:, :, :8, :8]).shape == (2, 3 * 8 * 8 * 3)


def test_diversity_and_drift_are_distances():
    pictures = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.5, 0.5]])
    found = s.diversity(pictures, np.array([0, 0, 0, 1]))
    half = np.sqrt(0.5)
    assert found[:3] == pytest.approx([(half + 1) / 2, half, (1 + half) / 2])
    assert np.isnan(found[3])
    assert s.drift(pictures, np.zeros((4, 2))) == pytest.approx([0, half, 1, 0.5])
