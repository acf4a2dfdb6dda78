"""DDIM against diffusers' scheduler, DDPM's posterior and a Gaussian's exact marginals."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from diffalign.backends import recorder
from diffalign.processes import PROCESSES, Levels
from diffalign.processes.ddim import table

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def scheduler(steps: int = 10, **kwargs):
    made = DDIMScheduler(**{**SD, "clip_sample": False, "set_alpha_to_one": False, **kwargs})
    made.set_timesteps(steps)
    return made


def levels(own) -> Levels:
    recording = recorder.stand_in(own, "ddpm", "pipeline")
    recording.set_timesteps(len(own.timesteps))
    return recorder.levels(recording, "ddpm")


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [10, 30])  # 30 do not divide 1000: diffusers' step ends beside the next timestep
def test_every_step_is_diffusers_ddim(prediction, eta, spacing, steps):
    own = scheduler(steps, prediction_type=prediction, timestep_spacing=spacing)
    found = PROCESSES["ddim"].table(levels(own), eta)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, generator=generator)
    for step, t in enumerate(own.timesteps):
        output, noise = torch.randn(2, 2, 5, generator=generator)
        expected = own.step(output, t, x, eta=eta, variance_noise=noise).prev_sample
        ours = float(found.x[step]) * x + float(found.prediction[step]) * output + float(found.std[step]) * noise
        # diffusers works in float32, and 1 / sqrt(abar) is 14.6 at the first step
        torch.testing.assert_close(ours, expected, atol=5e-5, rtol=0)
        x = expected


def test_invariant_13_eta_one_is_the_posterior_of_ddpm():
    given = levels(scheduler(50))
    found = table(given, 1.0)
    abar_t, abar_s = given.alpha[:-1] ** 2, given.alpha[1:] ** 2
    alpha, beta = abar_t / abar_s, 1 - abar_t / abar_s
    # q(x_s | x_t, x_0) of Ho et al. (arXiv 2006.11239, eq. 6 and 7), with x_0 = (x - sqrt(1 - abar) e) / sqrt(abar)
    on_clean = np.sqrt(abar_s) * beta / (1 - abar_t)
    on_x = np.sqrt(alpha) * (1 - abar_s) / (1 - abar_t)
    np.testing.assert_allclose(found.x, on_x + on_clean / np.sqrt(abar_t), atol=1e-12)
    np.testing.assert_allclose(found.prediction, -on_clean * np.sqrt((1 - abar_t) / abar_t), atol=1e-12)
    np.testing.assert_allclose(found.std**2, beta * (1 - abar_s) / (1 - abar_t), atol=1e-12)


def test_published_standard_deviations_and_gains_at_50_steps():
    found = table(levels(scheduler(50)), 1.0)
    np.testing.assert_allclose(found.std[[0, -1]], [0.4545, 0.0206], atol=5e-5)
    gain = np.abs(found.prediction) / found.std
    np.testing.assert_allclose(gain[[0, 25, 48, 49]], [0.51, 0.38, 3.27, 1.00], atol=5e-3)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_marginals_of_a_gaussian(eta):
    """x_0 ~ N(0.7, 0.25): with the exact prediction, the end approaches it as steps grow."""
    for steps, tolerance in ((50, 0.06), (500, 0.012)):
        given = levels(scheduler(steps))
        found = table(given, eta)
        mean, var = given.alpha[0] * 0.7, given.alpha[0] ** 2 * 0.25 + given.sigma[0] ** 2
        for i in range(steps):
            a, s = given.alpha[i], given.sigma[i]
            slope = s / (a**2 * 0.25 + s**2)  # E[n | x] = slope (x - a 0.7)
            mean, var = (
                found.x[i] * mean + found.prediction[i] * slope * (mean - a * 0.7),
                (found.x[i] + found.prediction[i] * slope) ** 2 * var + found.std[i] ** 2,
            )
        # the last level is abar_0 = 0.99915, not 1
        assert abs(var - 0.25) < tolerance
        assert mean == pytest.approx(0.7, abs=2e-3)


def test_the_three_predictions_are_one_sampler():
    """The same x_0 and n said in three ways give the same mean."""
    rng = np.random.default_rng(0)
    base = levels(scheduler())
    clean, noise = rng.normal(size=(2, 10))
    a, s = base.alpha[:-1], base.sigma[:-1]
    x = a * clean + s * noise
    said = {"epsilon": noise, "v_prediction": a * noise - s * clean, "sample": clean}
    means = []
    for prediction, output in said.items():
        found = table(Levels(base.alpha, base.sigma, prediction), 0.6)
        means.append(found.x * x + found.prediction * output)
    np.testing.assert_allclose(means[1], means[0], atol=1e-12)
    np.testing.assert_allclose(means[2], means[0], atol=1e-12)


def test_zero_terminal_snr_suits_v_prediction_and_is_refused_for_epsilon():
    own = scheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    given = levels(own)
    assert given.alpha[0] == pytest.approx(0, abs=1e-3)
    assert np.isfinite(table(given, 1.0).x).all()
    exact = Levels(np.where(given.alpha < 1e-3, 0.0, given.alpha), given.sigma, "epsilon")
    with pytest.raises(ValueError, match="alpha is 0"):
        table(exact, 0.0)


def test_a_prediction_nobody_knows_is_refused():
    base = levels(scheduler())
    with pytest.raises(ValueError, match="'flow_prediction', known are velocity, epsilon"):
        Levels(base.alpha, base.sigma, "flow_prediction")
