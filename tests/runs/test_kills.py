"""kill -9 at random moments, also while a checkpoint is written: no run is lost, and the adapter is bit for bit that of a run
that never stopped."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.kit import ROOT

RUNS = {
    "flow_grpo": ("flow_grpo/shapes-sd3", "rule.window=null", "optimizer.ema=0.5"),
    "ddpo": ("ddpo/shapes-sd", "rule.window=null", "rule.history_least=2", "prompts.tasks=[single_object]"),
    "truncated_bp": ("truncated_bp/shapes-sd3", "rule.depth=[1, 3]"),
}
SMALL = (
    "prompts.groups=2",
    "prompts.group_size=2",
    "optimizer.micro_batch=4",
    "sampler.steps=3",
    "sampler.guidance_scale=1",
    "evaluation.enabled=false",
    "output.samples=2",
    "output.sample_every=2",
    "output.checkpoint_every=1",
    "updates=6",
)


class Nursery:
    """Runs, killed or not."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "kit" / "nursery.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def start(self, rule: str, folder: Path) -> int:
        name, *overrides = RUNS[rule]
        self.process.stdin.write(json.dumps([name, *SMALL, *overrides, f"run_dir={folder}"]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def end(self) -> int:
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def nursery():
    made = Nursery()
    yield made
    made.process.kill()
    made.process.wait()


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "pytorch_lora_weights.safetensors")


def scores(folder: Path) -> str:
    """What a run logged of its samples, nothing where it scores none beforehand."""
    path = folder / "scores.jsonl"
    return path.read_text() if path.is_file() else ""


def kill(pid: int, folder: Path, after: float, while_writing: bool) -> None:
    """Kill after some seconds; or from then on as soon as a checkpoint is being written."""
    time.sleep(after)
    deadline = time.monotonic() + 2
    while while_writing and time.monotonic() < deadline and not any((folder / "checkpoints").glob(".*.part")):
        time.sleep(0.0005)
    with contextlib.suppress(ProcessLookupError):  # it was done before
        os.kill(pid, signal.SIGKILL)


def kills(nursery: Nursery, rule: str, wanted: int, tmp_path: Path) -> dict[str, int]:
    """Kill runs `wanted` times and let each come to its end; counts of kills, runs and kills during a write."""
    rng = random.Random(f"{rule} {wanted}")
    length = float("inf")
    for name in ("whole", "again"):  # the first run of a process is slower
        started = time.monotonic()
        nursery.start(rule, tmp_path / name)
        assert nursery.end() == 0
        length = min(length, time.monotonic() - started)
    whole = adapter(tmp_path / "whole")
    seen = {"kills": 0, "runs": 0, "writing": 0}
    while seen["kills"] < wanted:
        folder = tmp_path / f"run_{seen['runs']}"
        for _ in range(200):
            pid = nursery.start(rule, folder)
            if seen["kills"] < wanted:
                kill(pid, folder, rng.uniform(0, 0.8 * length), while_writing=rng.random() < 0.4)
            status = nursery.end()
            if status == 0:
                break
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"a resumed run failed: {status}"
            seen["kills"] += 1
            seen["writing"] += any((folder / "checkpoints").glob(".*.part"))
        found = adapter(folder)
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[k], whole[k]) for k in whole), f"run {seen['runs']} differs after its kills"
        assert scores(folder) == scores(tmp_path / "whole"), f"run {seen['runs']}: other scores logged"
        seen["runs"] += 1
    return seen


@pytest.mark.parametrize("rule", list(RUNS))
def test_twenty_kills_change_nothing(nursery, rule, tmp_path):
    seen = kills(nursery, rule, 20, tmp_path)
    assert seen["kills"] == 20
    lines = scores(tmp_path / "whole").splitlines()
    assert len(lines) == (0 if rule == "truncated_bp" else 6)  # it scores nothing before it learns
    assert seen["writing"] >= 2, seen  # some hit a checkpoint half written


@pytest.mark.slow
@pytest.mark.parametrize("rule", list(RUNS))
def test_two_hundred_kills_change_nothing(nursery, rule, tmp_path):
    seen = kills(nursery, rule, 67, tmp_path)
    print(rule, seen)
    assert seen["kills"] == 67
