"""The forward process of a sampler's levels: noised samples, what a network is to predict of them, and errors of predictions.

alpha, sigma are the level's numbers in x_t = alpha x_0 + sigma n.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from diffalign.ops import prediction
from diffalign.ops.gaussian import Reduce, reduce_latent
from diffalign.ops.shapes import same
from diffalign.types import Floats

SMALL = 1e-10


def noised(x0: Tensor, noise: Tensor, alpha: float, sigma: float) -> Tensor:
    """x_t = alpha x_0 + sigma n, (N, D...)."""
    same(x0=x0, noise=noise)
    return alpha * x0 + sigma * noise


def target(x0: Tensor, noise: Tensor, alpha: float, sigma: float, kind: str) -> Tensor:
    """What the network would predict knowing x_0 and n, (N, D...): n - x_0, n, alpha n - sigma x_0, or x_0."""
    same(x0=x0, noise=noise)
    return {
        "velocity": lambda: noise - x0,
        "epsilon": lambda: noise,
        "v_prediction": lambda: alpha * noise - sigma * x0,
        "sample": lambda: x0,
    }[kind]()


def clean(x: Tensor, predicted: Tensor, alpha: float, sigma: float, kind: str) -> Tensor:
    """The x_0 that a prediction at x_t implies, (N, D...)."""
    same(x=x, predicted=predicted)
    at_x, at_prediction, *_ = prediction.parts(np.array([alpha]), np.array([sigma]), kind)
    return float(at_x[0]) * x + float(at_prediction[0]) * predicted


def implied(alpha: float, sigma: float, kind: str) -> float:
    """How much of a prediction is in the x_0 that it implies."""
    return float(prediction.parts(np.array([alpha]), np.array([sigma]), kind)[1][0])


def error(a: Tensor, b: Tensor, reduce: Reduce = "mean") -> Tensor:
    """Squared difference, its mean or sum over latent dimensions, (N, D...) to (N,)."""
    same(a=a, b=b)
    return reduce_latent((a - b) ** 2, reduce)


def elbo_weights(alpha: Floats, sigma: Floats, kind: str) -> Floats:
    """W (K,) of K levels that a draw is equally likely at: the mean over draws of W_k sum_d (p - target)^2 is -log p(x_0) up to a constant
    of x_0, as far as it is decided between the first and the last of them; in nats.

    W_k = (K / 2) |d lambda_k| s_k^2 with lambda = log(alpha^2 / sigma^2) and its part by the trapezoidal rule, s the error of x_0 that one
    of the prediction makes, times alpha / sigma: alpha, 1, alpha, alpha / sigma (the loss in continuous time of
    arXiv 2107.00630).

    Raises:
        ValueError: for one level, and for one without signal or noise, which has no finite weight.
    """
    if len(alpha) < 2 or not ((alpha > 0) & (sigma > 0)).all():
        raise ValueError(
            f"elbo_weights: two levels or more, each with signal and noise, got alpha {alpha}, sigma {sigma}"
        )
    signal = alpha / sigma
    halves = np.abs(np.diff(2 * np.log(signal))) / 2
    share = np.append(halves, 0.0) + np.insert(halves, 0, 0.0)
    implied_by = prediction.parts(alpha, sigma, kind)[1]
    return len(alpha) / 2 * share * (implied_by * signal) ** 2


def against_own_walk(clean: Tensor, walked: Tensor, x0: Tensor) -> tuple[float, float]:
    """What tells a distilled network from a flow at a noise level: (D, q), both over E|f - x_0|^2, means over samples and dimensions.

    f: clean samples (N, D...) that a network predicts where its own samples x_0 were noised to; walked: where its own remaining steps
    without noise lead from there, f_s. D = E|f_s - f|^2: 0 where the network predicts the end of its walk, as an ideal distilled one does;
    1 for a flow whose walk is a draw given x_t. q = E<f, f - x_0>: 0 where f is the mean of x_0 given x_t, 1/2 where it is a draw.
    Not a number where f is x_0.
    """
    same(clean=clean, walked=walked, x0=x0)
    away = (clean - x0).double()
    size = float(away.square().mean())
    if size == 0:
        return float("nan"), float("nan")
    return float((walked - clean).double().square().mean()) / size, float((clean.double() * away).mean()) / size


def weighted(ell: Tensor, time: float, kind: str, power: float = 0.25) -> Tensor:
    """AWM's bounded growth functions of a squared error (N,) at a time in (0, 1] (arXiv 2509.25050, released code).

    uniform: ell; t: t ell; t2: t^2 ell; huber: t (sqrt(ell + 1e-10) - 1e-5); ghuber: (t / p) ((ell + 1e-10)^p - (1e-10)^p).
    """
    return {
        "uniform": lambda: ell,
        "t": lambda: time * ell,
        "t2": lambda: time**2 * ell,
        "huber": lambda: time * ((ell + SMALL).sqrt() - SMALL**0.5),
        "ghuber": lambda: time / power * ((ell + SMALL) ** power - SMALL**power),
    }[kind]()
