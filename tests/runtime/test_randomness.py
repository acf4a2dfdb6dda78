import numpy as np
import torch

from diffalign.runtime import randomness

LIKE = torch.zeros(1)


def test_noise_depends_on_the_key_alone():
    both = randomness.normal([3, 4], (2, 5), 7, like=LIKE)
    assert torch.equal(both[1:], randomness.normal([4], (2, 5), 7, like=LIKE))
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(both, randomness.normal([3, 4], (2, 5), 8, like=LIKE))


def test_noise_is_standard_normal_and_uncorrelated_between_neighbouring_keys():
    draws = randomness.normal(range(1000), (100,), 0, like=torch.zeros(1, dtype=torch.float64)).numpy()
    assert abs(draws.mean()) < 4 / np.sqrt(draws.size)
    assert abs(draws.var() - 1) < 4 * np.sqrt(2 / draws.size)
    assert abs((draws[1:] * draws[:-1]).mean()) < 4 / np.sqrt(draws[1:].size)


def test_keys_do_not_collide_and_their_order_matters():
    keys = {randomness.key(a, b) for a in range(100) for b in range(100)}
    assert len(keys) == 10_000
    assert all(0 <= key < 1 << 63 for key in keys)
    assert randomness.key(1, 2) != randomness.key(2, 1)
