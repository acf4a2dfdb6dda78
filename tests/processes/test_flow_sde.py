"""Flow samplers against published values, closed forms and diffusers' own scheduler. Txx: the project's test numbers."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from diffalign.processes import PROCESSES, Levels, flow_sde

# SD3.5 Medium's schedule: FlowMatchEuler with shift 3, T = 10, diffusers 0.42.1
SD3 = np.array([1, 0.960129, 0.913349, 0.857692, 0.790368, 0.707278, 0.602151, 0.464876, 0.278049, 0.008929, 0])


def table(sigma: np.ndarray, a: float):
    return flow_sde.table(Levels.flow(sigma), a)


def dance_table(sigma: np.ndarray, eta: float):
    return flow_sde.dance_table(Levels.flow(sigma), eta)


def ode_table(sigma: np.ndarray, level: float = 0.0):
    return flow_sde.ode_table(Levels.flow(sigma), level)


def shifted(steps: int, shift: float = 3.0) -> np.ndarray:
    u = np.linspace(1, 0, steps + 1)
    return shift * u / (1 + (shift - 1) * u)


def test_T1_standard_deviations_of_the_published_schedule():
    std = [0.7, 0.742964, 0.536152, 0.445897, 0.391794, 0.352797, 0.319070, 0.282007, 0.225360, 0.006278]
    # The levels above are rounded to 6 digits: 5e-7 of them is 6e-5 of the last, smallest one.
    np.testing.assert_allclose(table(SD3, 0.7).std, std, rtol=1e-4)
    dance = dance_table(shifted(16), 0.3).std
    np.testing.assert_allclose(dance[[0, -1]], [0.04423, 0.12247], rtol=1e-4)


def test_T1_gradient_weight_per_step_gain_over_std():
    found = table(SD3, 0.7)
    weights = np.abs(found.prediction) / found.std
    expected = [0.05696, 0.07839, 0.12924, 0.18798, 0.26403, 0.37099, 0.53564, 0.82480, 1.48675, 1.77061]
    np.testing.assert_allclose(weights, expected, rtol=2e-4)


def test_T2_one_family_equal_coefficients_where_the_diffusion_is_equal():
    # With one step from t to t', Flow-SDE at level a has g = a sqrt(t / (1 - t)): Dance-SDE at that g must agree.
    sigma = np.array([0.6, 0.45])
    g = 0.7 * np.sqrt(0.6 / 0.4)
    ours, dance = table(sigma, 0.7), dance_table(sigma, g)
    for a, b in zip((ours.x, ours.prediction, ours.std), (dance.x, dance.prediction, dance.std), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, process in PROCESSES.items() if process.kind == "flow"])
def test_T3_without_noise_every_process_is_diffusers_euler(name):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    sigma = scheduler.sigmas.double().numpy()
    quiet = PROCESSES[name].table(Levels.flow(sigma), 0.0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, generator=generator)
    for step, t in enumerate(scheduler.timesteps):
        v = torch.randn(2, 3, generator=generator)
        expected = scheduler.step(v, t, x).prev_sample
        ours = float(quiet.x[step]) * x + float(quiet.prediction[step]) * v
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)
        x = expected
    assert (quiet.std == 0).all()


def moments(kind, sigma, level):
    """Exact mean and variance at the end for x0 ~ N(0.7, 0.25), where the best velocity is affine in x."""
    found = kind(sigma, level)
    mean, var = 0.0, 1.0
    for i, t in enumerate(sigma[:-1]):
        # x_t = (1 - t) x0 + t n; E[n - x0 | x_t] = slope (x_t - (1 - t) 0.7) - 0.7
        total = (1 - t) ** 2 * 0.25 + t**2
        slope = (t - (1 - t) * 0.25) / total
        a = found.x[i] + found.prediction[i] * slope
        b = found.prediction[i] * (-slope * (1 - t) * 0.7 - 0.7)
        mean, var = a * mean + b, a**2 * var + found.std[i] ** 2
    return mean, var


@pytest.mark.parametrize(
    ("kind", "level", "at_10", "at_20"),
    [(ode_table, 0.0, 0.13667, 0.18624), (table, 0.7, 0.18008, 0.21055), (dance_table, 0.3, 0.14836, 0.19286)],
)
def test_T4_marginals_of_a_gaussian(kind, level, at_10, at_20):
    assert moments(kind, shifted(10), level)[1] == pytest.approx(at_10, abs=2e-5)
    assert moments(kind, shifted(20), level)[1] == pytest.approx(at_20, abs=2e-5)
    for steps in (20, 200, 1000):
        mean, var = moments(kind, shifted(steps), level)
        assert abs(var - 0.25) <= 1.6 / steps
        assert mean == pytest.approx(0.7, abs=1e-10)


@pytest.mark.parametrize("steps", [4, 10, 40])
def test_T7_first_flow_sde_step_injects_exactly_the_noise_level(steps):
    assert table(shifted(steps), 0.7).std[0] == pytest.approx(0.7, abs=1e-12)


def test_T9_gain_of_flow_sde():
    found, dt = table(SD3, 0.7), np.diff(SD3)
    np.testing.assert_allclose(found.prediction[1:], (dt * (1 + 0.7**2 / 2))[1:], rtol=1e-12)
    assert found.prediction[0] == pytest.approx(dt[0], rel=1e-12)


@pytest.mark.parametrize("levels", [[0.5, 0.0, 0.0], [0.2, 0.8], [1.5, 0.5, 0.0], [1.0], [0.5, -0.1]])
def test_levels_must_fall_within_unit_interval(levels):
    with pytest.raises(ValueError, match="must fall"):
        table(np.array(levels), 0.7)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.8, 1.0])
def test_T6_cps_keeps_the_coefficients_of_signal_and_noise(eta):
    """With the true velocity, x' = (1 - t') x_0 + c x_1 + s xi with c^2 + s^2 = t'^2."""
    sigma = shifted(10)
    found = PROCESSES["cps"].table(Levels.flow(sigma), eta)
    t, after = sigma[:-1], sigma[1:]
    # x = (1 - t) x_0 + t x_1 and v = x_1 - x_0
    signal = found.x * (1 - t) - found.prediction
    noise = found.x * t + found.prediction
    np.testing.assert_allclose(signal, 1 - after, atol=1e-12)
    np.testing.assert_allclose(noise**2 + found.std**2, after**2, atol=1e-12)
    np.testing.assert_allclose(found.std, after * np.sin(eta * np.pi / 2), atol=1e-15)
    assert found.std[-1] == 0


def test_T4_cps_is_not_marginal_preserving_and_by_how_much():
    def cps(sigma, eta):
        return PROCESSES["cps"].table(Levels.flow(sigma), eta)

    assert moments(cps, shifted(20), 0.8)[1] == pytest.approx(0.12242, abs=2e-5)
    assert moments(cps, shifted(10), 0.8)[1] == pytest.approx(0.09896, abs=2e-5)
