"""`python -m tests.families.lora_table`: every family's adapter in every format, written and read back: docs/lora.md's table."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch

from diffalign.errors import UserError
from diffalign.models import exporting, lora, lora_files, lora_pairs
from diffalign.models.notes import Notes
from diffalign.models.places import Adapter
from tests.families import FAMILIES, build
from tests.families.probe import policy

Differences = dict[str, dict[str, torch.Tensor]]


@functools.cache
def adapter(name: str) -> tuple[Path, Differences, str]:
    """A family's adapter in a folder as a run leaves it; what peft says it adds to every layer's weight; its denoiser."""
    place, own = Path(tempfile.mkdtemp()), policy(name)
    modules = lora.denoisers(own.pipe)
    notes = Notes(base_model="owner/name", denoisers=[type(m).__name__ for m in modules.values()])
    lora_files.save(own.pipe, place, notes.written())
    wanted = {
        component: {layer: part.get_delta_weight("default") for layer, part in lora_files.layers(module)}
        for component, module in modules.items()
    }
    return place, wanted, notes.denoisers[0]


def apart(name: str, form: str, folder: Path) -> float:
    """Write a family's adapter in a format, read it back, and compare: the largest difference of a layer over its largest number.

    Raises:
        UserError: if the format has no such model.
    """
    place, wanted, _ = adapter(name)
    out = folder / ("peft" if form == "peft" else "out.safetensors")
    files = exporting.export([Adapter(place)], out, form)
    pipe, worst = build(name), 0.0
    for written, (component, differences) in zip(files, wanted.items(), strict=True):
        found = lora_pairs.fitting(getattr(pipe, component), written.path)
        assert differences.keys() <= found.keys()
        for layer, pair in found.items():
            product = pair.scale * (pair.up.flatten(1) @ pair.down.flatten(1))
            # Layers that one of the tool's holds besides ours have nothing in them.
            other = differences[layer].flatten(1) if layer in differences else torch.zeros_like(product)
            worst = max(worst, float((product - other).abs().max() / other.abs().max().clamp_min(1e-3)))
    return worst


def _shown(value: float) -> str:
    return "equal" if value == 0 else f"{value:.0e}"


def main() -> None:
    """Print the table."""
    print(f"| family | {' | '.join(exporting.FORMATS)} |")
    print("|---" * (1 + len(exporting.FORMATS)) + "|")
    for name in FAMILIES:
        cells = []
        for form in exporting.FORMATS:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    cells.append(f"{_shown(apart(name, form, Path(folder)))}")
                except UserError:
                    cells.append("refused")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
