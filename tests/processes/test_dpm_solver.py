"""DPM-Solver++ against diffusers' scheduler, Euler, and the exact solution for a Gaussian."""

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from diffalign.processes import Levels
from diffalign.processes.dpm_solver import jumps
from diffalign.processes.flow_sde import ode_table

KINDS = {
    "flow": {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
    "epsilon": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    "v_prediction": {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
    },
}


def shifted(steps: int) -> np.ndarray:
    u = np.linspace(1, 0, steps + 1)
    return 3 * u / (1 + 2 * u)


def levels_of(scheduler, kind: str) -> Levels:
    sigmas = scheduler.sigmas.double().numpy()
    if kind == "flow":
        return Levels.flow(sigmas)
    alpha = 1 / np.sqrt(1 + sigmas**2)  # its sigmas are sigma / alpha
    return Levels(alpha, sigmas * alpha, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_is_diffusers_dpm_solver(kind):
    scheduler = DPMSolverMultistepScheduler(
        solver_order=2, solver_type="midpoint", final_sigmas_type="zero", timestep_spacing="trailing", **KINDS[kind]
    )
    scheduler.set_timesteps(16)
    found = jumps(levels_of(scheduler, kind), range(16))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    past = torch.zeros_like(x)
    for step, t in enumerate(scheduler.timesteps):
        output = torch.randn(2, 5, generator=generator, dtype=torch.float64)
        expected = scheduler.step(output, t, x).prev_sample
        ours = float(found.x[step]) * x + float(found.prediction[step]) * output + float(found.past[step]) * past
        past = float(found.clean_x[step]) * x + float(found.clean_prediction[step]) * output
        # diffusers keeps its levels in float32; x_0 = (x - sigma e) / alpha is 14 times x at the first step
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)
        x = expected


def solve(sigma: np.ndarray, order: int) -> float:
    """From x_1 = 1.3 to t = 0 with the exact velocity of x_0 ~ N(0.7, 0.25)."""
    found, euler = jumps(Levels.flow(sigma), range(len(sigma) - 1)), ode_table(Levels.flow(sigma))
    x, past = 1.3, 0.0
    for i, t in enumerate(sigma[:-1]):
        slope = (t - (1 - t) * 0.25) / ((1 - t) ** 2 * 0.25 + t**2)
        v = slope * (x - (1 - t) * 0.7) - 0.7
        clean = found.clean_x[i] * x + found.clean_prediction[i] * v
        table = euler if order == 1 else found
        memory = 0.0 if order == 1 else found.past[i] * past
        x = table.x[i] * x + table.prediction[i] * v + memory
        past = clean
    return float(x)


@pytest.mark.parametrize("steps", [20, 40, 80, 160])
def test_T8b_error_falls_at_least_four_times(steps):
    exact = 0.7 + 0.5 * 1.3  # quantiles are kept: x_0 = mean + std x_1
    first, second = (abs(solve(shifted(steps), order) - exact) for order in (1, 2))
    assert 4 * second < first


@pytest.mark.parametrize("steps", [[0], [3], [7], [2, 5], [0, 1]])
def test_T8b_first_order_steps_are_euler_over_any_distance(steps):
    """The first of some steps, and the last where it ends without noise."""
    sigma = shifted(8)
    found = jumps(Levels.flow(sigma), steps)
    stops = [*steps[1:], 8]
    for index in {0, len(steps) - 1}:
        assert found.past[index] == 0
        assert found.x[index] == pytest.approx(1, abs=1e-12)
        assert found.prediction[index] == pytest.approx(sigma[stops[index]] - sigma[steps[index]], abs=1e-12)


def test_memory_is_finite_where_there_is_no_signal_yet():
    """At t = 1 log(alpha / sigma) is -inf, so that the second step cannot weigh the first."""
    found = jumps(Levels.flow(shifted(6)), range(6))
    assert np.isfinite([found.x, found.prediction, found.past]).all()
    assert found.past[1] == 0
    assert (found.past[2:-1] < 0).all()
