"""diffalign: align image and video diffusion models with a reward; the update rule is one word in the config.

    from diffalign import load, train, sample, evaluate

`load` reads and checks a config, `train` runs it, `sample` draws with what came out, `evaluate` judges it on a suite of prompts. Each is
imported at its first use: a config is checked before torch is loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from diffalign.runtime import launcher

if TYPE_CHECKING:
    from diffalign.config.files import load as load
    from diffalign.evaluation.suite import evaluate as evaluate
    from diffalign.runs.session import train as train
    from diffalign.sampling.pictures import sample as sample

launcher.calm()  # before torch is imported
launcher.hush()

__version__ = "0.1.0"
__all__ = ["evaluate", "load", "sample", "train"]
_HOMES = {
    "load": "diffalign.config.files",
    "train": "diffalign.runs.session",
    "sample": "diffalign.sampling.pictures",
    "evaluate": "diffalign.evaluation.suite",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'diffalign' has no attribute {name!r}")
