"""Runs that earlier versions left behind go on, and end as they would have ended then."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffalign import config
from diffalign.runs import session

OLD = Path(__file__).parent / "old_runs"
# Rules whose sums were wrong when format 2 was written: step weights over the drawn steps, scale batch.
MENDED = {"flow_grpo"}
RUNS = sorted(path for path in OLD.glob("format_*/*") if path.is_dir())


# What is logged since.
SINCE = {
    *("lr", "pictures/diversity", "pictures/drift", "pictures/blank", "latents/rms"),
    *("norm_ratio", "norm_radial"),
}


def rows(path):
    """What a run logged, but for what depends on the clock, and what was not logged then."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [{key: value for key, value in row.items() if "seconds" not in key and key not in SINCE} for row in found]
    return [row for row in kept if row.keys() > {"update"}]


def keys_of(row):
    """What was logged, but for ends of intervals, since where prompts are too few there are none any more, and for what was spent."""
    return {key for key in row if not key.endswith(("_lo", "_hi", "_since_best")) and not key.startswith("spent/")}


@pytest.mark.parametrize("old", RUNS, ids=[f"{path.parent.name}-{path.name}" for path in RUNS])
def test_an_old_run_goes_on_as_it_would_have(old, tmp_path):
    shutil.copytree(old, tmp_path / "run")
    session.train(config.load(str(old / "config.yaml"), [f"run_dir={tmp_path / 'run'}", "updates=4"]), quiet=True)
    found, expected = (
        load_file(path)
        for path in (tmp_path / "run/adapter/pytorch_lora_weights.safetensors", old / "expected_after_4.safetensors")
    )
    assert found.keys() == expected.keys()
    lines, before = rows(tmp_path / "run/metrics.jsonl"), rows(old / "expected_after_4.jsonl")
    assert [keys_of(row) for row in lines[-3:]] == [keys_of(row) for row in before[-3:]]
    if old.parent.name == "format_2" and old.name in MENDED:
        return
    # LoRA's products are summed otherwise since, and elsewhere they were another machine's: the last bits differ, which a clip range
    # turns into another gradient here and there.
    began = load_file(old / "checkpoints/update_000002/tensors.safetensors")
    shifts = [tensor - began[f"parameters/{parameter(name)}"] for name, tensor in expected.items()]
    apart = [found[name] - tensor for name, tensor in expected.items()]
    assert size(apart) < 0.05 * size(shifts)


def parameter(name):
    """The trained tensor that a tensor of an adapter's file is."""
    return name.replace(".weight", ".default.weight")


def size(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors]).norm()
