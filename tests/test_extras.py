"""The optional parts, each installed into an environment of its own from the registry: they work, or say why not. Minutes each."""

import subprocess
import venv
from pathlib import Path

import pytest

from tests.kit import ROOT

pytestmark = pytest.mark.slow


def environment(folder: Path, extras: str):
    """Runs commands where `diffalign[extras]` is installed."""
    venv.create(folder, with_pip=True)
    done = subprocess.run(
        [folder / "bin" / "pip", "install", "--quiet", f"{ROOT}[{extras}]"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(folder / "bin" / "python"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)

    return run


def test_rewards(tmp_path):
    run = environment(tmp_path / "venv", "rewards")
    listed = run("-m", "diffalign", "rewards").stdout
    assert "pickscore" in listed
    assert "needs open_clip" not in listed
    tokens = run("-c", "from reward_models import _clip; print(_clip.tokens(['two stars']).shape)")
    assert "torch.Size([1, 77])" in tokens.stdout, tokens.stderr
    offline = run("-m", "diffalign", "rewards", "check", "pickscore")
    assert offline.returncode in (0, 2)
    assert offline.returncode == 0 or "give a folder as the hub lays it out as pickscore@PLACE" in offline.stderr


def test_hpsv2_agrees_with_its_package(tmp_path):
    run = environment(tmp_path / "venv", "rewards,hpsv2")
    (tmp_path / "tiny").mkdir()
    done = run(str(ROOT / "tests" / "extras" / "hpsv2_agrees.py"), str(tmp_path / "tiny"))
    assert done.stdout.strip().endswith("agrees"), done.stdout + done.stderr[-3000:]


def test_xformers_installs_and_is_refused_without_cuda(tmp_path):
    run = environment(tmp_path / "venv", "xformers")
    doctor = run("-m", "diffalign", "doctor").stdout
    assert "xformers" in doctor
    small = [
        "updates=1",
        "evaluation.enabled=false",
        "prompts.groups=1",
        "prompts.group_size=2",
        "optimizer.micro_batch=2",
    ]
    command = ["-m", "diffalign", "train", "flow_grpo/shapes-sd3", *small, "output.samples=1"]
    plain = run(*command, "run_dir=plain")
    assert plain.returncode == 0, plain.stderr[-2000:]  # its presence changes nothing
    asked = run(*command, "attention=xformers", "run_dir=asked")
    if "no device" in doctor:
        assert asked.returncode == 2, asked.stderr[-2000:]
        assert "attention: got 'xformers', which needs a CUDA device; allowed here is native" in asked.stderr
    else:
        assert asked.returncode == 0, asked.stderr[-2000:]
