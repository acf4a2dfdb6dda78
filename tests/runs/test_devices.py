"""What a run asks of the machine, and what it says where the machine cannot, tried without a card."""

import subprocess
import sys

import pytest
import torch

from diffalign.errors import Fault, UserError
from diffalign.runs import devices, session
from diffalign.runtime import device
from diffalign.runtime.distributed import ALONE, World
from diffalign.runtime.memory import card_fault, out_of_memory
from diffalign.training.backward import COMPILED, Backward
from tests.kit import ROOT
from tests.kit.helpers import TINY, checkpoints, tiny_config


def fault():
    return torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def test_c11_one_order_is_strict(any_order, tmp_path, monkeypatch):
    """An operation that adds in any order raises, and does not only warn."""
    device.one_order("cuda")

    def undetermined():
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))

    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        undetermined()
    monkeypatch.setattr(session.Session, "run", lambda self: undetermined())
    said = r"deterministic: got true, put_ .*has no such form on this device; allowed are auto and false"
    with pytest.raises(UserError, match=said):
        session.train(tiny_config(tmp_path / "run"), quiet=True)


def test_a_cpu_is_left_as_it_is(any_order):
    device.one_order("cpu")
    assert not torch.are_deterministic_algorithms_enabled()


def test_cudnns_attention_is_not_torchs_own_choice_on_a_card():
    was = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        device.settle("cpu")
        assert torch.backends.cuda.cudnn_sdp_enabled() == was
        device.settle("cuda:0")
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was)


def test_graphs_need_a_card_and_a_whole_network(tmp_path):
    with pytest.raises(
        UserError, match="speed: got graphs, which needs a CUDA device; allowed here are auto, eager, compile"
    ):
        devices.check(tiny_config(tmp_path, "speed=graphs"), ALONE)
    assert devices.recorder(tiny_config(tmp_path)) is None
    assert devices.promise(tiny_config(tmp_path)) == []


def test_a_run_on_a_card_says_which_promise_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert devices.recorder(tiny_config(tmp_path)) is not None
    assert devices.recorder(tiny_config(tmp_path, "speed=eager")) is None
    assert "equal to rounding, not bit for bit" in devices.promise(tiny_config(tmp_path))[0]
    assert "gives the same bits" in devices.promise(tiny_config(tmp_path, "deterministic=true"))[0]


def test_more_processes_than_cards_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    said = "device: got 2 processes for 1 CUDA device; allowed is one process each, or device=cpu"
    with pytest.raises(UserError, match=said):
        World.join(cuda=True)


def test_a_cards_fault_is_told_from_all_others():
    assert card_fault(fault())
    assert card_fault(RuntimeError("CUDA error: device-side assert triggered"))
    assert not card_fault(RuntimeError("shapes do not match"))
    assert not card_fault(torch.OutOfMemoryError("CUDA out of memory"))
    refused = torch.AcceleratorError("CUDA error: out of memory")
    assert out_of_memory(refused) and not card_fault(refused)


DIES = """
import sys, torch
from diffalign.training.trainer import Trainer
from diffalign.cli import main
own = Trainer.update
def update(self, index):
    if index == 1:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    return own(self, index)
Trainer.update = update
main(sys.argv[1:])
"""


def test_a_cards_fault_is_exit_code_3_and_the_checkpoint_goes_on(tmp_path):
    more = [*TINY, "updates=3", "output.checkpoint_every=1", f"run_dir={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, "-c", DIES, "train", "flow_grpo/shapes-sd3", *more],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 3
    lines = [line for line in done.stderr.splitlines() if line.startswith("diffalign: ")]
    (line,) = lines
    assert "the card failed under this process (AcceleratorError: CUDA error: an illegal memory access" in line
    assert "the last checkpoint is kept; `diffalign doctor --card`" in line and "attention=_native_math" in line
    assert [path.name for path in checkpoints(tmp_path / "run")][-1].endswith("1")
    session.train(tiny_config(tmp_path / "run", "updates=3", "output.checkpoint_every=1"), quiet=True)


class Compiled:
    exact, lossy = False, True


def test_c8_a_compiled_first_pass_may_differ_by_a_tenth_of_the_clip_range():
    backward = Backward(None, Compiled(), None)
    backward._check_gap(0.9e-5, 1e-4, "update 1", None)
    assert backward.gap == 0.9e-5
    with pytest.raises(Fault, match=COMPILED):
        backward._check_gap(1.1e-5, 1e-4, "update 1", type("Term", (), {"start": 0}))


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["none", "blocks"])
def test_compiled_blocks_train(checkpoint, tmp_path, capsys):
    config = tiny_config(tmp_path / "run", "speed=compile", f"memory.checkpoint={checkpoint}")
    session.train(config)
    assert "speed: compile: the first pass was within" in capsys.readouterr().err


def test_fewer_samples_of_the_base_model_than_processes_are_refused(tmp_path):
    settings = tiny_config(tmp_path, "rule.data={count: 2, rows: 1}", "prompts.groups=4", "optimizer.micro_batch=2")
    devices.check(settings, World(0, 2))
    with pytest.raises(UserError, match=r"rule\.data\.count: got 2 for 3 processes; allowed is at least one each"):
        devices.check(settings, World(0, 3))
