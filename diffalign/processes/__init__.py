"""Sampler maths. A process is a table of coefficients: mean_i = x[i] * x_i + prediction[i] * prediction_i, and std[i].

Every sampler the rules use is linear in the latent and the network's prediction, so its step is two numbers and a standard
deviation, computed once in float64. Level 0.0 of the noise gives the deterministic sampler with the same marginals.
"""

from __future__ import annotations

from diffalign.processes import cps, ddim, flow_sde
from diffalign.processes.table import Levels, Process, Table, linear_sigmas

# A process is added here: name -> how to make its table, and the kind of scheduler it belongs to.
PROCESSES: dict[str, Process] = {
    "flow_sde": Process("flow", flow_sde.table, stochastic=True),
    "dance_sde": Process("flow", flow_sde.dance_table, stochastic=True),
    "cps": Process("flow", cps.table, stochastic=True, highest=1.0),
    "ode": Process("flow", flow_sde.ode_table, stochastic=False),
    "ddim": Process("ddpm", ddim.table, stochastic=True, highest=1.0),
}

__all__ = ["PROCESSES", "Levels", "Process", "Table", "linear_sigmas"]
