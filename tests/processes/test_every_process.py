"""What every entry of `PROCESSES` promises, whatever its formula."""

import numpy as np
import pytest

from diffalign.processes import PROCESSES, Levels


def levels(kind: str) -> Levels:
    if kind == "flow":
        return Levels.flow(np.linspace(1, 0, 9))
    alpha = np.sqrt(np.linspace(0.01, 1, 9))  # of a DDPM schedule: alpha^2 + sigma^2 = 1
    return Levels(alpha, np.sqrt(1 - alpha**2), "epsilon")


@pytest.mark.parametrize("name", PROCESSES)
def test_noise_is_there_where_it_is_promised_and_up_to_the_highest_level(name):
    process, walked = PROCESSES[name], levels(PROCESSES[name].kind)
    highest = min(process.highest, 1.0)
    for level in (0.0, 0.5 * highest, highest):
        table = process.table(walked, level)
        for numbers in (table.x, table.prediction, table.std):
            assert numbers.shape == (8,)
            assert np.isfinite(numbers).all()
        assert (table.std >= 0).all()
        assert (table.std > 0).any() == (process.stochastic and level > 0)


@pytest.mark.parametrize("name", PROCESSES)
def test_without_noise_every_process_of_a_kind_takes_the_same_step(name):
    process = PROCESSES[name]
    walked = levels(process.kind)
    mine = process.table(walked, 0.0)
    # x_s = alpha_s x_0 + sigma_s n with the x_0 and n that the network's output says
    if process.kind == "flow":  # x_0 = x - sigma v, n = x + (1 - sigma) v: x_s = x + (s - sigma) v
        x, out = np.ones(8), np.diff(walked.sigma)
    else:  # x_0 = (x - sigma e) / alpha, n = e
        x = walked.alpha[1:] / walked.alpha[:-1]
        out = walked.sigma[1:] - x * walked.sigma[:-1]
    np.testing.assert_allclose(mine.x, x, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(mine.prediction, out, rtol=1e-10, atol=1e-12)
