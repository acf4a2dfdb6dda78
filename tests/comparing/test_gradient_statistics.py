"""The statistics against simulations whose answers are known."""

import numpy as np
import pytest

from diffalign.comparing.gradients import statistics
from diffalign.comparing.gradients.statistics import Products

REPEATS, COUNT, DIMS = 600, 24, 40
SCALES = np.linspace(0.2, 2.0, DIMS)  # of the noise, by coordinate


def noisy(rng, mean: np.ndarray) -> np.ndarray:
    return mean + SCALES * rng.standard_normal((COUNT, DIMS))


@pytest.mark.parametrize("size", [0.0, 0.3, 3.0])
def test_the_squared_norm_is_unbiased_and_its_interval_covers(size):
    rng, mean = np.random.default_rng(0), np.full(DIMS, size / DIMS**0.5)
    found = []
    for _ in range(REPEATS):
        d = noisy(rng, mean)
        found.append(statistics.squared_norm(d @ d.T))
    values = np.array([f.value for f in found])
    assert abs(values.mean() - size**2) < 4.5 * values.std() / REPEATS**0.5
    covered = np.mean([f.low <= size**2 <= f.high for f in found])
    assert covered > 0.95 - 4.5 * (0.05 * 0.95 / REPEATS) ** 0.5  # around 0 it is more, 0.99
    naive = np.array([(noisy(rng, mean).mean(0) ** 2).sum() for _ in range(100)])
    assert naive.mean() > size**2 + 0.5 * (SCALES**2).sum() / COUNT  # what would be reported without splitting


@pytest.mark.parametrize("count", [4, 8, 16, 32])
def test_the_squared_norm_s_interval_covers_with_few_gradients(count):
    """A variance that lacked ((M - 1) / (M - 2))^2 and took the total's for the pairs' own covered 0.85, 0.87, 0.91, 0.94 of these."""
    rng, mean, hits = np.random.default_rng(5), np.full(DIMS, 10 / DIMS**0.5), 0
    for _ in range(2000):
        d = mean + SCALES * rng.standard_normal((count, DIMS))
        found = statistics.squared_norm(d @ d.T)
        hits += found.low <= 100 <= found.high
    assert 0.93 < hits / 2000 < 0.97


def test_leaving_out_in_one_go_is_leaving_out_one_by_one():
    matrix = np.random.default_rng(6).normal(size=(7, 7))
    one_by_one = [statistics.off_diagonal_mean(np.delete(np.delete(matrix, k, 0), k, 1)) for k in range(len(matrix))]
    np.testing.assert_allclose(statistics.left_out(matrix), one_by_one, rtol=1e-12)


def test_how_many_would_do_is_about_right():
    """A gradient of size 1 among noise of variance 60: 8 batches do not resolve it, and so many more do, mostly."""
    rng, mean = np.random.default_rng(7), np.full(DIMS, 1 / DIMS**0.5)

    def drawn(count: int) -> Products:
        g, other = (mean + SCALES * rng.standard_normal((count, DIMS)) for _ in range(2))
        return Products.of(g, other)

    asked = [n for n in (statistics.enough(drawn(8)) for _ in range(200)) if n is not None]
    assert all(n > 2 for n in asked)
    resolved = [statistics.cosine(drawn(int(np.median(asked)) * 4)).known for _ in range(40)]
    assert np.mean(resolved) > 0.5


def test_a_relative_bias_of_noise_is_reported_around_0_and_a_real_one_is_found():
    rng = np.random.default_rng(1)
    truth, off = 5 * rng.standard_normal(DIMS), np.zeros(DIMS)
    off[0] = 10.0
    G = noisy(rng, truth)
    none = statistics.relative_bias(Products.of(noisy(rng, truth), G))
    assert none.low < 0 < none.high
    some = statistics.relative_bias(Products.of(G + off, G))
    size = float(np.linalg.norm(off) / np.linalg.norm(truth))
    assert some.value == pytest.approx(size, rel=0.05)
    assert statistics.relative_bias(Products.of(G, G)) == statistics.Interval(0, 0, 0)


def test_the_cosine_is_that_of_the_expectations_and_not_shrunk_by_noise():
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal(DIMS), rng.standard_normal(DIMS)
    expected = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    found = [statistics.cosine(Products.of(3 * noisy(rng, a), noisy(rng, b))) for _ in range(150)]
    values = np.array([f.value for f in found])
    assert abs(values.mean() - expected) < 0.01
    covered = np.mean([f.low <= expected <= f.high for f in found])
    assert covered > 0.88  # 95 %, standard deviation 1.8 %


def test_variance_is_the_trace_of_the_covariance():
    d = np.random.default_rng(3).standard_normal((10, DIMS))
    assert statistics.variance(d @ d.T) == pytest.approx(np.trace(np.cov(d.T)))


def test_what_noise_hides_is_not_a_number():
    flat, other = np.array([[1.0], [-1.0], [0.1]]), np.array([[-1.0], [1.0], [0.2]])
    for found in (statistics.relative_bias(Products.of(flat, other)), statistics.cosine(Products.of(flat, other))):
        assert np.isnan(found.value)
        assert not found.known


def test_signal_to_noise():
    d = np.array([[1.0, 0.1], [1.0, -0.1], [1.0, 0.0]])
    assert statistics.signal_to_noise(d @ d.T) == pytest.approx((1 - 0.01 / 3) / 0.01)
    flat = np.array([[1.0], [-1.0], [0.0]])
    assert statistics.signal_to_noise(flat @ flat.T) == 0.0
