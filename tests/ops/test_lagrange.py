"""Leaps against integrals that are computed another way, and against differential equations whose solutions are known."""

import numpy as np
import pytest

from diffalign.ops import lagrange, prediction

RNG = np.random.default_rng(0)
FORMS = [("velocity", "flow"), ("epsilon", "angle"), ("v_prediction", "angle"), ("sample", "angle")]


def integral(f, start: float, stop: float) -> float:
    """By 20 Gauss-Legendre points: exact to rounding for degrees up to 39."""
    x, w = np.polynomial.legendre.leggauss(20)
    return float((stop - start) / 2 * (w @ f((stop - start) / 2 * x + (stop + start) / 2)))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_42_weights_integrate_polynomials_below_their_number_and_no_others(count):
    nodes = np.sort(RNG.uniform(0.3, 1.0, count))[::-1]
    w = lagrange.weights(nodes, nodes[0], 0.1)
    for degree in range(count + 1):
        f = np.polynomial.Polynomial(RNG.uniform(0.5, 1.0, degree + 1))
        apart = abs(w @ f(nodes) - integral(f, nodes[0], 0.1))
        size = np.abs(w) @ np.abs(f(nodes))
        if degree < count:
            assert apart < 1e-12 * size  # float64; eight nodes that lie close lose three digits
        else:
            assert apart > 1e-9 * size  # the error's constant falls with the nodes


def test_evenly_spaced_nodes_to_the_last_are_simpsons_rule():
    np.testing.assert_allclose(lagrange.weights(np.array([0.0, 0.5, 1.0]), 0, 1), [1 / 6, 4 / 6, 1 / 6], rtol=1e-14)


def levels(form: str) -> tuple[np.ndarray, np.ndarray]:
    grid = np.linspace(1.0, 0.0, 11)
    return (1 - grid, grid) if form == "flow" else (np.cos(1.4 * grid), np.sin(1.4 * grid))


@pytest.mark.parametrize(("kind", "form"), FORMS)
@pytest.mark.parametrize("stop", [7, 10])
def test_42_a_leap_is_exact_where_the_slope_is_a_polynomial_of_less_degree_than_nodes(kind, form, stop):
    """x along the known solution of dx/dsigma = f(sigma), or dy/dlambda = f(lambda), f of degree 2."""
    alpha, sigma = levels(form)
    f = np.polynomial.Polynomial(RNG.uniform(0.5, 1.0, 3))
    time = sigma if kind == "velocity" else sigma / alpha
    y = f.integ()(time)
    x = y if kind == "velocity" else alpha * y
    # What the network says there: the slope itself, or what implies that noise.
    *_, noise_x, noise_p = prediction.parts(alpha[:-1], sigma[:-1], kind)
    p = f(time[:-1]) if kind == "velocity" else (f(time[:-1]) - noise_x * x[:-1]) / noise_p

    def apart(nodes: list[int]) -> float:
        a, of_x, of_p = lagrange.leap(alpha, sigma, kind, nodes, stop)
        return abs(a * x[nodes[0]] + of_x @ x[nodes] + of_p @ p[nodes] - x[stop])

    assert apart([2, 4, 6]) < 1e-12  # rounding of numbers up to 10
    assert apart([2, 6]) > 1e-4  # one node less is one degree less
    assert apart([2]) > apart([2, 6])


@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_a_leap_over_one_step_is_the_samplers_own(kind, form):
    from diffalign.processes import PROCESSES, Levels

    alpha, sigma = levels(form)
    table = PROCESSES["ode" if form == "flow" else "ddim"].table(Levels(alpha, sigma, kind), 0.0)
    for k in range(10):
        a, of_x, of_p = lagrange.leap(alpha, sigma, kind, [k], k + 1)
        assert a + of_x[0] == pytest.approx(table.x[k], rel=1e-12, abs=1e-12)
        assert of_p[0] == pytest.approx(table.prediction[k], rel=1e-12)


def test_a_level_without_signal_is_refused():
    with pytest.raises(ValueError, match="without signal"):
        lagrange.leap(np.array([0.0, 0.6, 1.0]), np.array([1.0, 0.8, 0.0]), "v_prediction", [0], 2)


def test_nodes_are_spread_from_the_first_step_to_the_last():
    assert lagrange.spread(range(3, 13), 3) == [3, 7, 12]
    assert lagrange.spread(range(3, 13), 1) == [3]
    assert lagrange.spread(range(3, 5), 8) == [3, 4]
    assert lagrange.spread(range(9, 10), 3) == [9]
