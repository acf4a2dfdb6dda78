"""The reward's slope handed to steps without a graph of the chain (FlowBP, arXiv 2606.11075): which steps, and what reaches each.

x[t+1] = a_t x[t] + b_t p_t + noise, p_t the network's prediction at x[t]. With the networks' inputs held fixed,
dR/dp_i = c_i dR/dx[T], c_i = b_i prod_{k > i} a_k; so one network call at a time is enough. Two leaps over several steps
each take the place of that chain in `leaps`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from diffalign import ops
from diffalign.protocols import Policy
from diffalign.types import Floats, Plan, Rollout, Schedule, Term

if TYPE_CHECKING:
    from torch import Tensor


def drawn(steps: range, count: int, late: float, rng: np.random.Generator) -> list[int]:
    """`count` different steps in the order of drawing, each in proportion to (step + 1)^late among those that are left."""
    # The first of clocks that ring at rates p is each in proportion to p, and so on.
    rings = rng.exponential(size=len(steps)) / _chances(steps, late)
    return [steps[k] for k in np.argsort(rings)[:count]]


def inverse(order: list[int], steps: range, late: float) -> list[float]:
    """Weights of steps drawn in this order that make their sum that of all steps on average.

    Des Raj's (1956): w_l = ((1 - p_1 - .. - p_{l-1}) / p_l + K - l) / K. The l-th draw with those before it estimates the whole sum
    on its own, and the K estimates are averaged. Drawn all, every step weighs 1.
    """
    if len(order) == len(steps):
        return [1.0] * len(order)
    p = _chances(steps, late)[np.array(order) - steps.start]
    left = 1 - np.append(0.0, np.cumsum(p)[:-1])
    later = np.arange(len(order))[::-1]
    return [float(weight) for weight in (left / p + later) / len(order)]


def _chances(steps: range, late: float) -> Floats:
    """(step + 1)^late, to a sum of 1."""
    weight = (np.array(steps) + 1.0) ** late
    return weight / weight.sum()


def coefficients(policy: Policy, plan: Plan) -> tuple[Floats, Floats]:
    """a (T,) and b (T,) of x[t+1] = a_t x[t] + b_t p_t + noise, under a plan's noise."""
    x, prediction, _ = zip(*(policy.table(plan, step) for step in range(len(plan.noise))), strict=True)
    return np.array(x), np.array(prediction)


def sensitivities(a: Floats, b: Floats) -> Floats:
    """c (T,): how far the last latent moves with each step's prediction, b_i prod_{k > i} a_k."""
    return b * np.array([math.prod(a[k + 1 :]) for k in range(len(a))])


def rescaled(a: Floats, b: Floats, steps: range, chosen: list[int], strength: float) -> float:
    """1 + rho (sum_all |c| / sum_chosen |c| - 1): what makes up for steps that are left out, at rho = 1."""
    c = np.abs(sensitivities(a, b))
    return float(1 + strength * (c[steps.start : steps.stop].sum() / c[chosen].sum() - 1))


def bridged(plan: Plan) -> int | None:
    """The step whose network's input keeps its gradient, if there is one."""
    return next((t.start for terms in plan.updates for t in terms if t.keep_slope and t.through == "slope"), None)


def reaching(part: Rollout, term: Term, a: Floats, gamma: float, scale: float) -> Tensor:
    """What reaches x[i+1] of a term's step i from the reward (N, D...): prod_{k > i} a_k dR/dx[T], or from the bridge that lies later.

    With a bridge at j it is lambda_j prod_{i < k < j} a_k, lambda_j = gamma dR/dx[j] + (1 - gamma) prod_{k >= j} a_k dR/dx[T], where
    dR/dx[j] goes through step j's network; it was kept of a loss that was multiplied by `scale`.
    """
    last, bridge, after = len(a), bridged(part.plan), term.start + 1
    if bridge is None or term.start >= bridge:
        return math.prod(a[after:]) * part.slope[last]
    arrived = gamma / scale * part.slope[bridge] + (1 - gamma) * math.prod(a[bridge:]) * part.slope[last]
    return math.prod(a[after:bridge]) * arrived


def leaps(steps: range, order: int, late: float, rng: np.random.Generator) -> tuple[list[int], int]:
    """The steps whose network calls make two leaps, from a drawn step to another one and from there to the end, and that other one.

    Drawn as `drawn`; of each leap at most `order` calls, the first at its start.
    """
    start, middle = sorted(drawn(steps, 2, late, rng))
    first, second = range(start, middle), range(middle, steps.stop)
    return [*ops.lagrange.spread(first, order), *ops.lagrange.spread(second, order)], middle


def reaching_leap(part: Rollout, schedule: Schedule, term: Term, gamma: float, support: float) -> tuple[float, Tensor]:
    """How far the end of a term's leap moves with its prediction, times `support` unless it is the leap's first, and what reaches that
    end from the reward (N, D...): dR/dx[T], or at the middle j, where x[T] = A x[j] + sum_m (X_m x[m] + P_m p_m),

        lambda_j = (A + X_j) dR/dx[T] + gamma P_j (dp_j/dx)^T dR/dx[T].

    Other latents are stored ones and carry none. The last part was kept of the loss of step j's own term.
    """
    plan, last = part.plan, part.plan.stop
    middle = bridged(plan)
    assert middle is not None
    calls = sorted(other.start for other in plan.updates[0] if other.through == "slope")
    here = [k for k in calls if (k >= middle) == (term.start >= middle)]
    levels = schedule.alpha, schedule.sigma, schedule.prediction
    *_, of_p = ops.lagrange.leap(*levels, here, last if term.start >= middle else middle)
    own = here.index(term.start)
    weight = float(of_p[own]) * (1.0 if own == 0 else support)
    if term.start >= middle:
        return weight, part.slope[last]
    kept, of_x, _ = ops.lagrange.leap(*levels, [k for k in calls if k >= middle], last)
    return weight, (kept + float(of_x[0])) * part.slope[last] + gamma * part.slope[middle]
