"""Kernels of a card, each tried in a process of its own: a wrong one is seen, and one that ends its process ends no run.

python -m diffalign.runtime.trials FORM DEVICE FIRST    prints a JSON line for each case from the FIRST on
"""

from __future__ import annotations

import importlib
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffalign.errors import Fault, UserError

Form = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
BACKENDS = {
    "_native_flash": SDPBackend.FLASH_ATTENTION,
    "_native_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "_native_cudnn": SDPBackend.CUDNN_ATTENTION,
    "_native_math": SDPBackend.MATH,
}
NORM = "RMSNorm"  # torch's fused one with a frozen weight, as networks have it on queries and keys
# Width of a head, tokens, whether there is a mask: 704 is 64 mod 128, where a kernel is known to be wrong (pytorch issue 196678).
CASES = tuple(itertools.product((64, 128), (704, 1280), (False, True)))
# Relative to float32, in the Euclidean norm: bfloat16 has 2^-9 = 2e-3 a rounding; right ones gave 4e-3 and 6e-3 on an H200.
FORWARD, BACKWARD = 1e-2, 2e-2
SECONDS = 120  # of one process


@dataclass(frozen=True)
class Trial:
    """What one kernel did in one case: right (with milliseconds of call and gradient), refused (it does not take such a call), wrong or
    fault (its process ended)."""

    form: str
    head: int
    tokens: int
    masked: bool
    found: str
    detail: str = ""
    ms: float = 0.0


def tried(form: str, device: str = "cuda") -> list[Trial]:
    """All cases of one kernel. A process that dies is followed by one that begins after the case in which it died."""
    found: list[Trial] = []
    while len(found) < len(CASES):
        command = [sys.executable, "-m", "diffalign.runtime.trials", form, device, str(len(found))]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
            lines, end = done.stdout.splitlines(), f"its process ended with code {done.returncode}"
        except subprocess.TimeoutExpired as error:
            text = error.stdout or b""
            lines = (text.decode() if isinstance(text, bytes) else text).splitlines()
            end = f"no answer in {SECONDS} s"
        found += [Trial(**json.loads(line)) for line in lines if line.startswith("{")]
        if len(found) < len(CASES):
            found.append(Trial(form, *CASES[len(found)], "fault", end))
    return found


def all_tried(forms: tuple[str, ...] = (*BACKENDS, NORM), device: str = "cuda") -> dict[str, list[Trial]]:
    """Every kernel: two at a time, since starting a process takes longer than what it does.

    Raises:
        UserError: if the device is not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--card: torch sees no CUDA device here")
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(forms, pool.map(lambda form: tried(form, device), forms), strict=True))


def fastest(found: dict[str, list[Trial]]) -> str | None:
    """The attention that is never wrong, takes what has no mask, and takes the least time there; None: there is none."""
    seconds = {}
    for form, trials in found.items():
        plain = [trial for trial in trials if not trial.masked]
        never_wrong = all(trial.found in ("right", "refused") for trial in trials)
        if form in BACKENDS and never_wrong and all(trial.found == "right" for trial in plain):
            seconds[form] = sum(trial.ms for trial in plain)
    return min(seconds, key=lambda form: seconds[form], default=None)


def right_one(found: dict[str, list[Trial]], own: tuple[str, ...]) -> str:
    """What attention is to be by itself: torch's choice, "native", if none of the kernels `own` that it chooses among is ever wrong; else
    the fastest that is right.

    Raises:
        Fault: if none is.
    """
    if all(trial.found in ("right", "refused") for form in own for trial in found[form]):
        return "native"
    if (best := fastest(found)) is None:
        raise Fault("attention: no kernel of this card is right; see `diffalign doctor --card`")
    return best


def try_case(form: str, device: str, head: int, tokens: int, masked: bool) -> Trial:
    """One case in this process, forward and backward, in bfloat16 against plain arithmetic in float32 on the same numbers."""
    torch.manual_seed(tokens + head)
    heads = 24 if device == "cuda" else 2
    given = [torch.randn(1, heads, tokens, head, device=device, dtype=torch.bfloat16) for _ in range(4)]
    mask = (torch.rand(1, 1, 1, tokens, device=device) > 0.2) if masked else None
    function = _form(form, head, device)
    try:
        out, gradients = _both(function, given, mask)
    except RuntimeError as error:
        if "No available kernel" in str(error) or "Invalid backend" in str(error):
            return Trial(form, head, tokens, masked, "refused")
        raise
    wide, exact = _both(_norm(head, device) if form == NORM else _exact, [x.float() for x in given], mask)
    apart = _apart(out, wide)
    apart_back = max((_apart(a, b) for a, b in zip(gradients, exact, strict=True)), default=0.0)
    detail = f"forward {apart:.1e}, backward {apart_back:.1e} from float32"
    if not (apart <= FORWARD and apart_back <= BACKWARD):  # NaN is not
        return Trial(form, head, tokens, masked, "wrong", detail)
    return Trial(
        form, head, tokens, masked, "right", detail, _milliseconds(lambda: _both(function, given, mask), device)
    )


def _form(form: str, head: int, device: str) -> Form:
    if form == NORM:
        return _norm(head, device)
    if ":" in form:
        module, _, name = form.partition(":")
        return getattr(importlib.import_module(module), name)
    backend = BACKENDS[form]

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return attend


def _norm(head: int, device: str) -> Form:
    def norm(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        weight = torch.linspace(0.5, 1.5, head, device=device, dtype=q.dtype)
        return F.rms_norm(q, (head,), weight, 1e-6)

    return norm


def _exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(-1) @ v


def _both(function: Form, given: list[Tensor], mask: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """A call and its gradients, for a gradient of the output that is the fourth tensor."""
    q, k, v = (x.detach().requires_grad_() for x in given[:3])
    out = function(q, k, v, mask)
    out.backward(given[3])
    return out.detach(), [x.grad for x in (q, k, v) if x.grad is not None]


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def _milliseconds(work: Callable[[], object], device: str, rounds: int = 5) -> float:
    found = []
    for _ in range(rounds + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return 1000 * sorted(found[1:])[rounds // 2]


def main(form: str, device: str, first: str) -> None:
    """The cases of one kernel in this process, each printed as soon as it is done."""
    for case in CASES[int(first) :]:
        print(json.dumps(vars(try_case(form, device, *case))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
