"""How long a network's predictions are beside a reference's (NormGuard, arXiv 2606.27771; the hinge's form is ours).

With rho = |v| / |v_ref| and radial = <v - v_ref, v_ref> / |v_ref|^2: rho^2 = (1 + radial)^2 + tangential^2. So a prediction may grow
without growing along the reference's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.ops.shapes import same


def ratio(predicted: Tensor, reference: Tensor) -> Tensor:
    """rho (N,) of predictions (N, D...), their norms over all latent dimensions."""
    same(predicted=predicted, reference=reference)
    return predicted.flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)


def radial(predicted: Tensor, reference: Tensor) -> Tensor:
    """<v - v_ref, v_ref> / |v_ref|^2 (N,): how much longer along the reference's own direction."""
    same(predicted=predicted, reference=reference)
    own, base = predicted.flatten(1), reference.flatten(1)
    return ((own - base) * base).sum(1) / (base * base).sum(1)


def excess(predicted: Tensor, reference: Tensor, slack: float) -> Tensor:
    """max(0, rho - 1 - slack)^2 (N,): row by row, so that a short row does not make up for a long one."""
    return (ratio(predicted, reference) - 1 - slack).clamp(min=0) ** 2


def metrics(predicted: Tensor, reference: Tensor) -> dict[str, Tensor]:
    """Means over rows, for the log."""
    with torch.no_grad():
        return {"norm_ratio": ratio(predicted, reference).mean(), "norm_radial": radial(predicted, reference).mean()}
