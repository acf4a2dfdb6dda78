"""Which policy drives a pipeline: `DiffusersPolicy`, unless its class is named here."""

from __future__ import annotations

import importlib
from typing import Any

from diffalign.backends.diffusers import DiffusersPolicy

# pipeline class -> "module:Class" of a `DiffusersPolicy`; an override is a file and an entry. None is needed so far.
BACKENDS: dict[str, str] = {}


def policy_class(pipe: Any) -> type[DiffusersPolicy]:
    """The policy for a pipeline."""
    place = BACKENDS.get(type(pipe).__name__)
    if place is None:
        return DiffusersPolicy
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)
