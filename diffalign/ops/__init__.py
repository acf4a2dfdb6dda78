"""Arithmetic: tensors in, tensors out; no model, no config, no I/O.

Submodules load on first use, so that rules can name them in `from diffalign import ops` without importing torch.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffalign.ops import advantages, gaussian, geneval, implicit, lagrange, matching, norms, prediction, surrogate

__all__ = ["advantages", "gaussian", "geneval", "implicit", "lagrange", "matching", "norms", "prediction", "surrogate"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"diffalign.ops.{name}")
    raise AttributeError(f"module 'diffalign.ops' has no attribute {name!r}")
