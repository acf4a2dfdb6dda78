"""Intervals that respect prompts, paired gains, and evaluation files."""

import numpy as np
import pytest

from diffalign.evaluation.intervals import interval
from diffalign.evaluation.results import Evaluation


def test_interval_of_independent_prompts_is_the_normal_one():
    rng = np.random.default_rng(0)
    values = rng.normal(0.3, 1.0, 400)
    found = interval(values, np.arange(400))
    half = 1.96 * values.std(ddof=1) / 20
    assert found.value == pytest.approx(values.mean())
    # 2,000 resamples know a quantile to about 4 % of the half-width
    assert found.low == pytest.approx(values.mean() - half, abs=0.12 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.12 * half)


def test_images_of_one_prompt_are_not_independent():
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(20), 20)
    values = rng.normal(size=20)[group]  # all images of a prompt agree: 20 observations, not 400
    wide, narrow = interval(values, group), interval(values, np.arange(400))
    assert (wide.high - wide.low) > 3 * (narrow.high - narrow.low)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(1)
    group, hits = np.repeat(np.arange(24), 8), 0
    for k in range(200):
        values = 0.5 + rng.normal(0, 0.2, 24)[group] + rng.normal(0, 0.5, 192)
        found = interval(values, group, seed=k)
        hits += found.low <= 0.5 <= found.high
    assert 0.88 <= hits / 200 <= 0.98  # a percentile bootstrap of 24 prompts covers a little less than 95 %


def test_scores_that_are_not_there_are_left_out():
    found = interval(np.array([1.0, np.nan, 3.0]), np.array([0, 0, 1]))
    assert found.value == 2.0
    assert np.isnan(interval(np.array([np.nan]), np.array([0])).value)


def test_equal_scores_have_a_point_for_an_interval():
    found = interval(np.ones(30), np.arange(30))
    assert (found.low, found.value, found.high) == (1.0, 1.0, 1.0)


def test_pairing_removes_what_the_images_have_in_common(tmp_path):
    rng = np.random.default_rng(2)
    group = np.repeat(np.arange(30), 4)
    shared = rng.normal(size=120)
    before = Evaluation(0, {"r": shared}, group)
    after = Evaluation(9, {"r": shared + 0.1 + rng.normal(0, 0.01, 120)}, group)
    row = after.summary(before).row()
    assert row["eval/n"] == 120
    assert row["eval/r_gain"] == pytest.approx(0.1, abs=0.005)
    assert 0.09 < row["eval/r_gain_lo"] < row["eval/r_gain"] < row["eval/r_gain_hi"] < 0.11
    assert row["eval/r_hi"] - row["eval/r_lo"] > 10 * (row["eval/r_gain_hi"] - row["eval/r_gain_lo"])
    after.save(tmp_path / "e" / "a.json", seed=1)
    back = Evaluation.read(tmp_path / "e" / "a.json")
    np.testing.assert_array_equal(back.scores["r"], after.scores["r"])
    assert "eval/r_gain" not in after.summary().row()
