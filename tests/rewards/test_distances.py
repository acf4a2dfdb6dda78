"""Distances between pictures against closed forms."""

import numpy as np
import pytest

from diffalign.rewards import distances as s


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
