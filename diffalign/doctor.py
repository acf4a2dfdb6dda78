"""`diffalign doctor`: versions, devices, optional parts, and the command that mends each."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from dataclasses import dataclass

CORE = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "numpy",
    "scipy",
    "pillow",
    "pydantic",
)
OPTIONAL = {
    "open_clip": ("open_clip_torch", "rewards"),
    "torchvision": ("torchvision", "rewards"),
    "hpsv2": ("hpsv2", "hpsv2"),
    "xformers": ("xformers", "xformers"),
    "tensorboard": ("tensorboard", "trackers"),
    "wandb": ("wandb", "trackers"),
}


@dataclass(frozen=True)
class Finding:
    """One line of the report; a mend is a command to type."""

    name: str
    status: str
    mend: str = ""
    broken: bool = False


def examine() -> list[Finding]:
    """Look at this machine's installation."""
    found = [Finding("python", platform.python_version())]
    for package in CORE:
        try:
            found.append(Finding(package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding(package, "missing", "pip install diffalign", broken=True))
    for module, (package, extra) in OPTIONAL.items():
        if importlib.util.find_spec(module) is None:
            found.append(Finding(package, "not installed (optional)", f"pip install 'diffalign[{extra}]'"))
        else:
            found.append(_import(module, package, extra))
    if not any(item.broken for item in found):
        found += _devices()
    return found


def _import(module: str, package: str, extra: str) -> Finding:
    version = importlib.metadata.version(package)
    try:
        importlib.import_module(module)
    except Exception as error:  # any failure of a third party's import is what is to be reported
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return Finding(
            package, f"{version}, does not import: {line}", f"pip install -U 'diffalign[{extra}]'", broken=True
        )
    return Finding(package, version)


def _devices() -> list[Finding]:
    import torch

    from diffalign.shapes import models

    found = [Finding("cpu threads", str(torch.get_num_threads()))]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            memory = torch.cuda.get_device_properties(index).total_memory / 2**30
            found.append(Finding(f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, {memory:.0f} GiB"))
    else:
        found.append(Finding("cuda", "no device; the embedded pipelines run on the CPU"))
    found.append(Finding("embedded pipelines", ", ".join(models.names()) or "none", broken=not models.names()))
    return found
