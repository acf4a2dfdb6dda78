"""Intervals that respect prompts, paired gains, and evaluation files."""

import numpy as np
import pytest

from diffalign.evaluation.intervals import mean
from diffalign.evaluation.results import Evaluation


def test_images_of_one_prompt_are_not_independent():
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(20), 20)
    values = rng.normal(size=20)[group]  # all images of a prompt agree: 20 observations, not 400
    wide, narrow = mean(values, group), mean(values, np.arange(400))
    assert (wide.high - wide.low) > 3 * (narrow.high - narrow.low)


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
