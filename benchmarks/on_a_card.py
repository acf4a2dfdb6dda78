"""What a card does with full-size denoisers, random weights, nothing fetched: python benchmarks/on_a_card.py [OUT.json]

For each preset, in a process of its own with a time limit: seconds and allocated bytes of a sampled and a trained micro-batch, by what is
switched on; how near that is to what the card's products give; the count that `diffalign plan` makes beside what was allocated. Ten minutes
on an H100. `--layers 2 --pixels 64` tries it on a CPU.
"""

from __future__ import annotations

import argparse
import inspect
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from peft.tuners.lora.layer import Linear as PeftLinear

from diffalign import config as configs
from diffalign.models import lora, untrained
from diffalign.models.checkpointing import by_blocks
from diffalign.models.graphs import Graphs
from diffalign.planning import architectures
from diffalign.planning.bounds import matrix_rate
from diffalign.runtime.device import settle
from diffalign.runtime.memory import out_of_memory, peak_bytes, release

GIB = 2**30
# preset, rows of a micro-batch, base
RUNS = (
    ("ddpo/sd15", 8, "none"),
    ("ddpo/sdxl", 2, "none"),
    ("flow_grpo/sd35-medium", 8, "none"),
    ("flow_grpo/z-image", 4, "none"),
    ("flow_grpo/flux-dev", 4, "nf4"),
    ("flow_grpo/wan21", 2, "none"),
)
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def main() -> None:
    """All presets, one process each; a result is written as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=Path(__file__).parent / "results" / "on_a_card.json")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print the table of a result that is there")
    parser.add_argument("--presets", nargs="*", default=[name for name, *_ in RUNS])
    parser.add_argument("--layers", type=int, help="of each denoiser, to try the script")
    parser.add_argument("--pixels", type=int, help="height and width, to try the script")
    parser.add_argument("--seconds", type=float, default=95, help="limit of one preset")
    parser.add_argument("--one", nargs=3, metavar=("PRESET", "ROWS", "BASE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.table:
        print(table(json.loads(given.table.read_text(encoding="utf-8"))))
        return
    if given.one:
        for found in measure(given.one[0], int(given.one[1]), given.one[2], given.layers, given.pixels):
            print(json.dumps(found), flush=True)
        return
    result: dict[str, Any] = {"machine": machine(), "rows": []}
    for name, rows, base in RUNS:
        if name in given.presets:
            result["rows"].append(child(name, rows, base if CUDA else "none", given))
            given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))


def machine() -> dict[str, Any]:
    """What it ran on."""
    card = torch.cuda.get_device_name() if CUDA else f"CPU, {platform.machine()}"
    return {
        "device": card,
        "driver": torch.version.cuda or "",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "date": date.today().isoformat(),
        "product_tflops": round(rate() / 1e12, 2),
    }


def rate() -> float:
    """FLOP/s of a large product, in bfloat16 on a card."""
    if not CUDA:
        return matrix_rate()
    a = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    seconds = timed(lambda: a @ a)
    return 2 * 8192**3 / seconds


def child(name: str, rows: int, base: str, given: argparse.Namespace) -> dict[str, Any]:
    """One preset's result; what it died of, if it did: a fault of a card ends its process."""
    command = [sys.executable, __file__, "--one", name, str(rows), base]
    for key in ("layers", "pixels"):
        command += [f"--{key}", str(value)] if (value := getattr(given, key)) else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=given.seconds, check=False)
        text, problem = done.stdout, ""
        if done.returncode:
            problem = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    except subprocess.TimeoutExpired as error:
        text, problem = (error.stdout or b"").decode(), f"took longer than {given.seconds:g} s"
    lines = [line for line in text.splitlines() if line.startswith("{")]
    found = json.loads(lines[-1]) if lines else {"preset": name, "rows": rows, "base": base}
    print(f"{name} {problem or 'done'}", flush=True)
    return found | ({"problem": problem} if problem else {})


def timed(work: Callable[[], Any], rounds: int = 3) -> float:
    """Median seconds, after one call that is not counted."""
    found = []
    for k in range(rounds + 1):
        if CUDA:
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if CUDA:
            torch.cuda.synchronize()
        found += [time.perf_counter() - started] if k else []
    return statistics.median(found)


@dataclass
class Subject:
    """A preset's denoiser with LoRA, its input of some rows, and what a row of it is counted to take; run: how it is called."""

    component: str
    module: Any
    trained: dict[str, torch.Tensor]
    call: dict[str, Any]
    row: architectures.Row
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.run = self.module.forward
        self.with_lora = lora.layers(SimpleNamespace(**{self.component: self.module}))

    def forward(self) -> torch.Tensor:
        """The prediction."""
        out = self.run(**self.call, return_dict=False)[0]
        return torch.stack(out) if isinstance(out, list) else out

    def sample(self) -> None:
        """A call without a graph."""
        with torch.no_grad():
            self.forward()

    def train(self) -> None:
        """A call and its gradient."""
        self.forward().float().square().mean().backward()

    def off(self) -> None:
        """A call without a graph and without LoRA."""
        with lora.disabled(self.with_lora):
            self.forward()

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Calls as CUDA graphs, for the length of the context."""
        own = list(self.trained.values())
        graphs = Graphs(self.component, self.module, self.module.forward, own, lambda: None, self.said.append)
        self.run = graphs
        try:
            yield
        finally:
            graphs.forget()
            self.run = self.module.forward
            release()


def prepared(name: str, rows: int, base: str, layers: int | None, pixels: int | None) -> Subject:
    """A preset's denoiser on the device."""
    size = [f"sampler.pipeline_args={{height: {pixels}, width: {pixels}, num_frames: 5}}"] if pixels else []
    settings = configs.load(name, ["rewards={jpeg_compressibility: 1.0}", "eval_rewards=[]", *size])
    facts = architectures.entry(settings)
    (component, (kind, given)), *_ = facts["denoisers"].items()
    given = smaller(kind, given, layers) if layers else given

    def attached(module: Any) -> dict[str, torch.Tensor]:
        pipe = SimpleNamespace(**{component: module})
        return lora.attach(pipe, settings.lora.rank, settings.lora.alpha, None, 0)

    with untrained.meta(settings.precision):
        counted_on = getattr(diffusers, kind)(**given).requires_grad_(False)
        attached(counted_on)
    row, module = architectures.row(settings, counted_on), built(kind, given, base)
    call = {key: batch(key, spec, settings, rows) for key, spec in facts["inputs"].items()}
    return Subject(component, module, attached(module), call, row)


def measure(name: str, rows: int, base: str, layers: int | None, pixels: int | None) -> Iterator[dict[str, Any]]:
    """One preset on this machine: what is known of it after each measurement."""
    settle(DEVICE)
    started = time.perf_counter()
    subject = prepared(name, rows, base, layers, pixels)
    row, module = subject.row, subject.module
    subject.train()  # gradients are there from now on
    found: dict[str, Any] = {
        "preset": name,
        "rows": rows,
        "base": base,
        "trained_m": sum(p.numel() for p in subject.trained.values()) / 1e6,
        "seconds_to_build": round(time.perf_counter() - started, 1),
        "weights_gib": round(sum(p.nbytes for p in module.parameters()) / GIB, 2),
    }
    works = {
        "sample": (subject.sample, row.forward, row.quiet),
        "train": (subject.train, row.both, row.plain.peak),
        "sample, no LoRA": (subject.off, row.forward, None),
        "train, blocks": (subject.train, row.both + row.forward, row.blocks.peak),
    }
    for what, (work, flops, counted) in works.items():
        if what.endswith("blocks") and not by_blocks(module):
            continue
        found[what] = result(work, rows * flops, None if counted is None else rows * counted)
        yield found
        if CUDA and "LoRA" not in what:
            with subject.recorded():
                found[f"{what}, graphs"] = result(work, rows * flops, None)
            found |= {"not recorded": subject.said[0]} if subject.said else {}
            yield found
    with pefts_own():
        module.disable_gradient_checkpointing()
        for what, work in (("sample", subject.sample), ("train", subject.train)):
            found[f"{what}, peft's products"] = result(work, None, None)
            yield found


def result(work: Callable[[], Any], flops: float | None, counted: float | None) -> dict[str, Any]:
    """Seconds, allocated GiB above what lay there, and beside them the count's."""
    try:
        seconds, peak = timed(work), peak_bytes(work)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        release()
        return {"problem": "out of memory"}
    found: dict[str, Any] = {"seconds": round(seconds, 4), "peak_gib": round(peak / GIB, 3)}
    if flops is not None:
        found["tflops"] = round(flops / seconds / 1e12, 2)
    if counted is not None:
        found["counted_gib"] = round(counted / GIB, 3)
    return found


@contextmanager
def pefts_own() -> Iterator[None]:
    """LoRA as peft multiplies it: in float32."""
    from diffalign.models.products import _Lean

    lean = _Lean.forward
    _Lean.forward = PeftLinear.forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        _Lean.forward = lean  # type: ignore[method-assign]


def smaller(kind: str, given: dict[str, Any], layers: int) -> dict[str, Any]:
    """A denoiser's settings with few layers."""
    takes = inspect.signature(getattr(diffusers, kind).__init__).parameters
    few = {key: layers for key in ("num_layers", "num_single_layers", "n_layers", "n_refiner_layers") if key in takes}
    if "dual_attention_layers" in given:
        few["dual_attention_layers"] = [k for k in given["dual_attention_layers"] if k < layers]
    return given | few


def built(kind: str, given: dict[str, Any], base: str) -> Any:
    """The denoiser on the device with random weights, its linear layers packed as `base` says."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        module = getattr(diffusers, kind)(**given).requires_grad_(False).eval()
    torch.set_default_dtype(torch.float32)
    if base == "nf4":
        for parent in list(module.modules()):
            for name, layer in list(parent.named_children()):
                if type(layer) is torch.nn.Linear:
                    setattr(parent, name, packed(layer))
        release()
    return module


def packed(layer: torch.nn.Linear) -> torch.nn.Module:
    """A linear layer in 4 bits, as bitsandbytes makes it when weights are loaded; packed where they are."""
    import bitsandbytes as bnb

    made = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None, torch.bfloat16, quant_type="nf4", device="meta"
    )
    weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True)
    made.weight, made.bias = weight._quantize(layer.weight.device), layer.bias
    return made


def batch(key: str, spec: Any, settings: configs.Config, rows: int) -> Any:
    """An input of the denoiser for so many rows, by the table of architectures."""
    sizes = architectures.sizes(settings)
    if isinstance(spec, dict) and "value" in spec:
        value = architectures.dimension(spec["value"], sizes)
        return value * rows if key == "img_shapes" else value
    if isinstance(spec, dict) and "list" in spec:
        shape = architectures.dimension(spec["list"], sizes)
        return [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(rows)]
    if isinstance(spec, dict):
        return {name: batch(name, inner, settings, rows) for name, inner in spec.items()}
    shape = architectures.dimension(spec, sizes)
    shape = [rows, *shape[1:]] if key == "time_ids" or "ids" not in key else shape
    if key in ("timestep", "t", "guidance") or "mask" in key:
        return torch.ones(shape, device=DEVICE, dtype=torch.bfloat16)
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) * ("ids" not in key)


def table(found: dict[str, Any]) -> str:
    """The result as Markdown: seconds a row of the micro-batch, and what of the card's own rate for large products that is."""
    bound = found["machine"]["product_tflops"]
    lines = [
        f"{found['machine']['device']}, {found['machine']['date']}, torch {found['machine']['torch']}: products {bound:g} TFLOP/s",
        "",
        "| preset | rows | what | ms a row | TFLOP/s | of the card | peak GiB | counted |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in found["rows"]:
        head = f"| {one['preset']} {one['base'].replace('none', '')} | {one['rows']} |"
        if "problem" in one:
            lines.append(f"{head} {one['problem']} | - | - | - | - | - |")
        for what, got in ((key, value) for key, value in one.items() if isinstance(value, dict)):
            if "problem" in got:
                lines.append(f"{head} {what} | {got['problem']} | - | - | - | - |")
                continue
            speed = f"{got['tflops']:.0f} | {got['tflops'] / bound:.0%}" if "tflops" in got else "- | -"
            peak = "recorded" if what.endswith("graphs") else f"{got['peak_gib']:.2f}"
            counted = f"{got['counted_gib']:.2f}" if "counted_gib" in got else "-"
            lines.append(f"{head} {what} | {1000 * got['seconds'] / one['rows']:.0f} | {speed} | {peak} | {counted} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
