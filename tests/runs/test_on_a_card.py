"""What a run promises on a CUDA device: run with -m gpu."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file

from diffalign import config as configs
from diffalign.models import checkpointing
from diffalign.runs import session
from diffalign.runtime import trials
from diffalign.runtime.device import settle
from diffalign.runtime.memory import peak_bytes
from tests.kit.helpers import tiny

pytestmark = pytest.mark.gpu

RULES = [
    "flow_grpo/shapes-sd3",
    "ddpo/shapes-sd",
    "truncated_bp/shapes-sd3",
    "rlr/shapes-sd3",
    "awm/shapes-sd3",
    "nft/shapes-sd3",
    "branch_grpo/shapes-sd3",
    "grpo_guard/shapes-sd3",
]
FAMILIES = ["flow_grpo/shapes-sd3", "ddpo/shapes-sd", "flow_grpo/shapes-wan"]


def config_of(name, folder, *more):
    return configs.load(name, [*tiny(name), "evaluation.prompts=2", f"run_dir={folder}", *more])


def trained(name, folder, *more):
    session.train(config_of(name, folder, *more), quiet=True)
    return load_file(session.adapter_file(config_of(name, folder, *more)))


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def apart(a, b):
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


@pytest.mark.parametrize("speed", ["eager", "graphs"])
@pytest.mark.parametrize("checkpoint", ["none", "blocks"])
@pytest.mark.parametrize("name", FAMILIES)
def test_c2_first_ratios_are_exactly_one(name, checkpoint, speed, tmp_path):
    more = ("precision=bfloat16", "updates=3", f"memory.checkpoint={checkpoint}", f"speed={speed}")
    trained(name, tmp_path / "run", *more)
    ratios = [row["ratio"] for row in rows(tmp_path / "run") if "ratio" in row]  # an update of equal rewards has none
    assert ratios and set(ratios) == {1.0}


@pytest.mark.parametrize("name", RULES)
def test_c2_a_deterministic_run_resumes_bit_for_bit(name, tmp_path, any_order):
    whole = trained(name, tmp_path / "whole", "deterministic=true", "updates=4", "output.checkpoint_every=2")
    trained(name, tmp_path / "parts", "deterministic=true", "updates=2", "output.checkpoint_every=2")
    parts = trained(name, tmp_path / "parts", "deterministic=true", "updates=4", "output.checkpoint_every=2")
    assert apart(whole, parts) == 0


@pytest.mark.parametrize("name", ["flow_grpo/shapes-sd3", "truncated_bp/shapes-sd3"])
def test_c2_any_other_run_resumes_equal_to_rounding(name, tmp_path):
    whole = trained(name, tmp_path / "whole", "updates=4", "output.checkpoint_every=2")
    trained(name, tmp_path / "parts", "updates=2", "output.checkpoint_every=2")
    parts = trained(name, tmp_path / "parts", "updates=4", "output.checkpoint_every=2")
    largest = max(float(x.abs().max()) for x in whole.values())
    assert (
        apart(whole, parts) <= 0.01 * largest
    )  # Adam's first steps turn a rounding of a tiny gradient into a share of lr


def test_c4_out_of_memory_for_real_halves_the_micro_batch_and_goes_on(tmp_path, capsys):
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    held = torch.cuda.memory_allocated()
    torch.cuda.set_per_process_memory_fraction((held + 60 * 2**20) / total)
    try:
        more = ("prompts.groups=4", "prompts.group_size=64", "optimizer.micro_batch=256", "updates=1", "speed=eager")
        session.train(config_of("flow_grpo/shapes-sd3", tmp_path / "run", *more, "evaluation.enabled=false"))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "going on with optimizer.micro_batch" in capsys.readouterr().err


def test_c5_kill_9_on_a_card_and_the_same_command_goes_on(tmp_path):
    command = [sys.executable, "-m", "diffalign", "train", "flow_grpo/shapes-sd3", *tiny("flow_grpo")]
    command += [f"run_dir={tmp_path / 'run'}", "updates=40", "output.checkpoint_every=1", "evaluation.prompts=2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = tmp_path / "run" / "metrics.jsonl"
    ended = time.time() + 90
    while time.time() < ended and not (metrics.exists() and metrics.read_text().count("\n") > 3):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = rows(tmp_path / "run")[-1]["update"]
    again = subprocess.run([*command, f"updates={done + 2}"], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert rows(tmp_path / "run")[-1]["update"] == done + 2


@pytest.mark.parametrize("blocks", [False, True])
def test_c12_attention_with_heads_of_128_trains(blocks):
    """FLUX's, of little width: its double and its single blocks together were where cuDNN's gradient failed."""
    settle("cuda")
    torch.manual_seed(0)
    given = {"num_layers": 2, "num_single_layers": 2, "attention_head_dim": 128, "num_attention_heads": 4}
    sizes = {"in_channels": 16, "joint_attention_dim": 64, "pooled_projection_dim": 32, "axes_dims_rope": (16, 56, 56)}
    with torch.device("cuda"):
        module = FluxTransformer2DModel(**given, **sizes, guidance_embeds=False).to(torch.bfloat16)
        call = {
            "hidden_states": torch.randn(2, 1024, 16, dtype=torch.bfloat16).requires_grad_(),
            "encoder_hidden_states": torch.randn(2, 512, 64, dtype=torch.bfloat16),
            "pooled_projections": torch.randn(2, 32, dtype=torch.bfloat16),
            "timestep": torch.full((2,), 0.5),
            "txt_ids": torch.zeros(512, 3),
            "img_ids": torch.randint(0, 32, (1024, 3)).float(),
        }
    assert not blocks or checkpointing.by_blocks(module)
    out = module(**call, return_dict=False)[0]
    out.float().square().mean().backward()
    torch.cuda.synchronize()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)
    assert call["hidden_states"].grad.abs().max() > 0


def test_c9_the_cards_kernels_are_tried(capsys):
    found = trials.all_tried(("_native_math", "_native_flash", trials.NORM))
    assert {trial.found for trial in found["_native_math"]} == {"right"}
    assert {trial.found for trial in found["_native_flash"]} <= {"right", "refused"}
    assert trials.fastest(found) in ("_native_math", "_native_flash")


def test_peaks_are_the_allocators():
    assert peak_bytes(lambda: torch.empty(2**22, device="cuda")) == 2**24
