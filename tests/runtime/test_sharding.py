"""Processes that hold a network together are one run, bit for bit; on the CPU, with gloo."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from diffalign import config as configs
from diffalign.errors import UserError
from diffalign.models import loading, lora
from diffalign.runs import devices
from diffalign.runs.folder import read_rows
from diffalign.runtime import sharding
from diffalign.runtime.distributed import World
from tests.kit import ROOT
from tests.kit.processes import launch
from tests.runtime.test_distributed import adapter, command

WORKER = """
import os, sys, torch
torch.set_num_threads(1)
from diffalign.runtime.distributed import World
from tests.runtime import test_sharding
world = World.join()
getattr(test_sharding, sys.argv[1])(world, *sys.argv[2:])
world.leave()
sys.stdout.flush()
os._exit(0)
"""


def both(folder: Path, size: int, *more: str) -> None:
    """The same run whole and sharded."""
    for name, shard in (("whole", "none"), ("shared", "blocks")):
        run = command(folder / name, "updates=2", "evaluation.every=1", f"memory.shard={shard}", *more)
        for done in launch(size, run):
            assert done.returncode == 0, done.stderr


def rows(run: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in read_rows(run)]


@pytest.mark.parametrize(
    ("size", "more"),
    [
        pytest.param(2, ["memory.checkpoint=blocks", "rule={name: flow_grpo, kl: 0.1}"], marks=pytest.mark.wide),
        pytest.param(2, ["precision=bfloat16", "memory.checkpoint=none"], marks=pytest.mark.slow),
        pytest.param(4, ["optimizer.micro_batch=1", "memory.checkpoint=both"], marks=pytest.mark.slow),
    ],
)
def test_m18_a_shared_network_gives_the_bits_of_a_whole_one(size, more, tmp_path):
    """The adapter after two updates, every logged number, and the evaluations' scores; the evaluation's last share is uneven."""
    both(tmp_path, size, *more, "evaluation.prompts=3", "evaluation.images_per_prompt=1", "evaluation.tasks=[counting]")
    whole, shared = adapter(tmp_path / "whole"), adapter(tmp_path / "shared")
    assert all(torch.equal(shared[key], tensor) for key, tensor in whole.items())
    assert rows(tmp_path / "whole") == rows(tmp_path / "shared")


@pytest.mark.slow
def test_m18_a_checkpoint_of_either_goes_on_as_the_other(tmp_path):
    """Two processes with a shared network, then one without."""
    first = command(tmp_path / "run", "updates=1", "evaluation.enabled=false", "memory.shard=blocks")
    assert [done.returncode for done in launch(2, first)] == [0, 0]
    (again,) = launch(1, command(tmp_path / "run", "updates=2", "evaluation.enabled=false"))
    assert again.returncode == 0, again.stderr
    assert "resuming after update 1" in again.stderr
    last = command(tmp_path / "run", "updates=3", "evaluation.enabled=false", "memory.shard=blocks")
    assert [done.returncode for done in launch(2, last)] == [0, 0]


def held(world: World, folder: str, name: str, dtype: str) -> None:
    """Bytes of a sharded denoiser that this process has, and of the whole."""
    pipe = loading.load(name, getattr(torch, dtype))[0]
    trained = lora.attach(pipe, 4, 8.0, None, 0)
    (module,) = lora.denoisers(pipe).values()
    own = {id(p) for p in trained.values()}
    frozen = [p for p in module.parameters() if id(p) not in own]
    whole = sum(p.nbytes for p in frozen)
    sharding.shard(module, trained.values(), "cpu")
    mine = sum((p.to_local() if hasattr(p, "to_local") else p).nbytes for p in module.parameters() if id(p) not in own)
    assert all(not hasattr(p, "to_local") for p in trained.values())
    Path(folder, f"{world.rank}").write_text(f"{mine} {whole}")


@pytest.mark.parametrize(
    ("name", "dtype"), [("shapes-sd", "float32"), pytest.param("shapes-wan", "bfloat16", marks=pytest.mark.wide)]
)
def test_each_process_holds_its_part(name, dtype, tmp_path):
    """Half of everything of the common type; Wan keeps norms and tables in float32, which stay whole."""
    for done in launch(2, ["-c", WORKER, "held", str(tmp_path), name, dtype]):
        assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        mine, whole = map(int, (tmp_path / str(rank)).read_text().split())
        assert mine < (0.56 if name != "shapes-wan" else 0.7) * whole


def test_what_cannot_share_is_refused(tmp_path):
    def asked(size, *more):
        devices.check(
            configs.load("flow_grpo/shapes-sd3", [*command(tmp_path, *more)[4:], "memory.shard=blocks"]), World(0, size)
        )

    with pytest.raises(UserError, match=r"memory\.shard: got blocks, one process has nobody to share with"):
        asked(1)
    with pytest.raises(UserError, match="each of 2 processes has 3 of an update's samples"):
        asked(2, "prompts.groups=3", "prompts.group_size=2")
    with pytest.raises(UserError, match=r"memory\.shard: got blocks with memory\.quantize int8"):
        asked(2, "memory.quantize=int8")
    with pytest.raises(UserError, match=r"rule\.data\.rows: got 3, with memory\.shard all 2 processes run the network"):
        asked(2, "rule.data={count: 256, rows: 3}")
    asked(2)


def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def agents(run: list[str]) -> list[subprocess.Popen]:
    """Two torchrun agents, as on two machines, that meet over a rendezvous."""
    where = f"127.0.0.1:{port()}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", where, "--rdzv-id", "x", "--max-restarts", "0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return [
        subprocess.Popen([*torchrun, *meet, *run], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]


@pytest.mark.slow
def test_m20_two_agents_that_meet_are_two_processes(tmp_path):
    few = ("updates=1", "evaluation.enabled=false", "memory.shard=blocks")
    for process in agents(command(tmp_path / "met", *few)):
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
    assert [done.returncode for done in launch(2, command(tmp_path / "two", *few))] == [0, 0]
    met, two = adapter(tmp_path / "met"), adapter(tmp_path / "two")
    assert all(torch.equal(met[key], tensor) for key, tensor in two.items())


@pytest.mark.slow
def test_m19_a_process_that_is_killed_ends_all_and_the_checkpoint_goes_on(tmp_path):
    """Killed while they run the network together; the other one says so, code 3, and a run with both goes on."""
    few = ("evaluation.enabled=false", "memory.shard=blocks", "output.checkpoint_every=1")
    run, address = command(tmp_path / "run", "updates=500", *few), str(port())
    processes = []
    for rank in range(2):
        env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        more = {"MASTER_PORT": address, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        processes.append(
            subprocess.Popen(
                [sys.executable, *run], env={**os.environ, **env, **more}, stderr=subprocess.PIPE, text=True
            )
        )
    wanted = tmp_path / "run" / "checkpoints" / "update_000002"
    began = time.monotonic()
    while not wanted.is_dir() and time.monotonic() - began < 120:
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGKILL)
    _, error = processes[0].communicate(timeout=120)
    processes[1].communicate()
    assert processes[0].returncode == 3, error
    assert "another process is gone" in error
    done = launch(2, command(tmp_path / "run", f"updates={len(read_rows(tmp_path / 'run')) + 3}", *few))
    assert [each.returncode for each in done] == [0, 0], done[0].stderr
    assert "resuming after update" in done[0].stderr
