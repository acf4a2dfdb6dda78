"""Scores are given once: what their names depend on, and what is never kept."""

import sqlite3

import numpy as np
import pytest

from diffalign.evaluation import score_cache as cache
from diffalign.rewards import catalog


def test_names_depend_on_pixels_prompt_reward_and_version():
    frames = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    base = cache.key(frames, {"prompt": "a"}, "r", "1")
    assert base == cache.key(frames.copy(), {"prompt": "a"}, "r", "1")
    other = frames.copy()
    other[1, 3, 3, 2] ^= 1
    changed = [
        cache.key(other, {"prompt": "a"}, "r", "1"),
        cache.key(frames.reshape(1, 8, 4, 3), {"prompt": "a"}, "r", "1"),
        cache.key(frames, {"prompt": "b"}, "r", "1"),
        cache.key(frames, {"prompt": "a", "tag": "x"}, "r", "1"),
        cache.key(frames, {"prompt": "a"}, "s", "1"),
        cache.key(frames, {"prompt": "a"}, "r", "2"),
    ]
    assert len({base, *changed}) == 7


def test_a_version_changes_with_code_and_weights(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def f(media, prompts): ...\n")
    first = cache.version(catalog.find(f"{path}:f"))
    path.write_text("def f(media, prompts): return 1\n")
    assert cache.version(catalog.find(f"{path}:f")) != first
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "model.bin").write_bytes(b"1")
    before = cache.version(catalog.find(f"clipscore@{weights}"))
    assert before == cache.version(catalog.find(f"clipscore@{weights}"))
    (weights / "model.bin").write_bytes(b"22")
    assert cache.version(catalog.find(f"clipscore@{weights}")) != before
    versions = [cache.version(catalog.find(name)) for name in ("shapes_geneval", "shapes_geneval_strict")]
    assert None not in versions
    assert versions[0] != versions[1]


@pytest.mark.parametrize("name", ["http://localhost:1/score", "vlm_judge@http://localhost:1/v1#m"])
def test_what_runs_behind_an_address_has_no_version(name):
    assert cache.version(catalog.find(name)) is None


def test_failures_are_not_kept_and_scores_come_back(tmp_path):
    kept = cache.ScoreCache(tmp_path / "scores.sqlite")
    kept.write(["a", "b", "c"], [1.5, float("nan"), float("inf")])
    kept.write(["a"], [2.5])
    assert kept.read(["a", "b", "c", "d"]) == [2.5, None, None, None]
    kept.close()
    assert sqlite3.connect(tmp_path / "scores.sqlite").execute("SELECT key, score FROM signed").fetchall() == [
        ("a", 2.5)
    ]
