"""`diffalign doctor`: versions, devices, optional parts, and the command that mends each."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffalign.runtime.extras import PARTS, Part, missing

if TYPE_CHECKING:
    from diffalign.runtime.trials import Trial

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


@dataclass(frozen=True)
class Finding:
    """One line of the report; a mend is a command to type."""

    name: str
    status: str
    mend: str = ""
    broken: bool = False

    def __str__(self) -> str:
        return f"{self.name:20} {self.status}" + (f"  -> {self.mend}" if self.mend else "")


def examine(card: bool = False) -> list[Finding]:
    """Look at this machine's installation. card: and try the CUDA device's kernels.

    Raises:
        UserError: for a card where there is none.
    """
    findings = [Finding("python", platform.python_version())]
    for package in CORE:
        try:
            findings.append(Finding(package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(package, "missing", "pip install diffalign", broken=True))
    for module, part in PARTS.items():
        if mend := missing(module):
            findings.append(Finding(part.package, "not installed (optional)", mend))
        else:
            findings.append(_import(module, part))
    if not any(item.broken for item in findings):
        findings += _devices()
    return [*findings, *(_kernels() if card else [])]


def _import(module: str, part: Part) -> Finding:
    version = importlib.metadata.version(part.package)
    try:
        importlib.import_module(module)
    except Exception as error:  # any failure of a third party's import is what is to be reported
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        mend = part.install.replace("install", "install -U")
        return Finding(part.package, f"{version}, does not import: {line}", mend, broken=True)
    return Finding(part.package, version)


def _kernels() -> list[Finding]:
    from diffalign.runtime import trials

    found = trials.all_tried()
    findings = [kernel(form, each) for form, each in found.items()]
    best = trials.fastest(found)
    line = f"fastest that is never wrong: attention={best}" if best else "none is right in every case"
    return [*findings, Finding("attention", line, broken=best is None)]


def kernel(form: str, found: Sequence[Trial]) -> Finding:
    """What to say of a kernel: what is wrong with it, or how fast it is and what it does not take. A wrong one that nobody asks for is no
    fault of the installation."""
    bad = [trial for trial in found if trial.found in ("wrong", "fault")]
    if bad:
        case = f"heads of {bad[0].head}, {bad[0].tokens} tokens{', a mask' * bad[0].masked}"
        own = form == "_native_cudnn" or ":" in form
        mend = "" if own else "attention=_native_math goes round it"
        return Finding(
            form, f"{bad[0].found} in {len(bad)} of {len(found)} cases: {case}: {bad[0].detail}", mend, not own
        )
    plain = [trial.ms for trial in found if trial.found == "right" and not trial.masked]
    if not plain:
        return Finding(form, "does not run here")
    masks = "" if any(t.masked and t.found == "right" for t in found) else "; takes no mask"
    return Finding(form, f"right, {sum(plain) / len(plain):.2f} ms forward and backward{masks}")


def _devices() -> list[Finding]:
    import torch

    from diffalign.shapes import models

    findings = [Finding("cpu threads", str(torch.get_num_threads()))]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            memory = torch.cuda.get_device_properties(index).total_memory / 2**30
            findings.append(Finding(f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, {memory:.0f} GiB"))
    else:
        findings.append(Finding("cuda", "no device; the embedded pipelines run on the CPU"))
    findings.append(Finding("embedded pipelines", ", ".join(models.names()) or "none", broken=not models.names()))
    return findings
