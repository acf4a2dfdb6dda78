"""What a comparison's units were trained with: versions and machine."""

from __future__ import annotations

import importlib.metadata
import platform
from datetime import datetime, timezone
from typing import Any

from diffalign.runtime import launcher

PACKAGES = ("diffalign", "torch", "diffusers", "transformers", "peft", "numpy")


def of_run(jobs: int | None, units: int) -> dict[str, Any]:
    """Of the command that trains now: so many units, so many at a time; None: as many as there was room for."""
    import torch

    cards = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "units": units,
        "jobs": jobs,
        "machine": ", ".join(dict.fromkeys(cards)) or f"{platform.machine()} CPU",
        "cores": launcher.cpus(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # from a folder of source
        return None
