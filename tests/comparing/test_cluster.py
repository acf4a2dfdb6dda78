"""Units on a Ray cluster: what each is given of it, and that a worker which dies in the midst changes no number."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from diffalign import comparing
from diffalign.comparing.cluster import Share, reached, share
from diffalign.errors import UserError
from tests.comparing.test_comparison import METHODS, WORDS, numbers, trained
from tests.kit import ROOT
from tests.kit.helpers import checkpoints

SMALL, CARDS, HEAD = {"CPU": 4.0}, {"CPU": 64.0, "GPU": 8.0}, {"CPU": 0.0}


@pytest.mark.parametrize(
    ("device", "nodes", "jobs", "given"),
    [
        ("auto", [SMALL], None, Share(1, 0)),
        ("auto", [SMALL, CARDS], None, Share(8, 1)),
        ("cpu", [SMALL, CARDS], None, Share(1, 0)),
        ("cuda", [HEAD, {"CPU": 4.0, "GPU": 8.0}], None, Share(1, 1)),
        ("cpu", [SMALL, SMALL], 4, Share(2, 0)),
        ("cpu", [SMALL, SMALL], 1, Share(4, 0)),  # no more than a node has
        ("cpu", [SMALL], 100, Share(1, 0)),
        ("auto", [CARDS, CARDS], 4, Share(32, 1)),
    ],
)
def test_what_a_unit_is_given(device, nodes, jobs, given):
    assert share(device, nodes, jobs) == given


@pytest.mark.parametrize(
    ("device", "nodes", "said"),
    [
        ("cuda:1", [CARDS], "device: got cuda:1; allowed with --ray are auto, cuda and cpu"),
        ("cuda", [SMALL], "--ray: no node of the cluster has a GPU and a CPU, and device: got cuda"),
        ("cpu", [HEAD], "--ray: no node of the cluster has a CPU, and device: got cpu"),
    ],
)
def test_what_it_cannot_be_given(device, nodes, said):
    with pytest.raises(UserError) as error:
        share(device, nodes)
    assert said in str(error.value)


def test_ray_missing_is_said(tmp_path, monkeypatch):
    comparison = comparing.opened(WORDS, tmp_path / "out", seeds="0", budget="updates=1")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--ray: it needs ray, which is not installed: pip install 'diffalign\[ray\]'"):
        comparing.trained(comparison, None, print, ray="auto")


@pytest.fixture(scope="module")
def cluster():
    """The address of one on this machine, with two CPUs; its processes end with the one that began it."""
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = tempfile.mkdtemp(prefix="r", dir="/tmp")  # its sockets' paths must be short
    ray = Path(sys.executable).with_name("ray")
    asked = ["--head", "--block", "--num-cpus=2", f"--port={port}", "--include-dashboard=false", f"--temp-dir={place}"]
    quiet = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [ray, "start", *asked, "--node-ip-address=127.0.0.1"], env=quiet, stdout=subprocess.DEVNULL
    )
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.2)
    time.sleep(5)  # the node joins after the port is there
    yield f"127.0.0.1:{port}"
    process.terminate()
    process.wait(30)
    shutil.rmtree(place, ignore_errors=True)


def compare(place, address, seeds="0") -> list[str]:
    words = [*WORDS, "--out", str(place), "--budget", "updates=3", "--seeds", seeds, "--ray", address]
    return [sys.executable, "-m", "diffalign", "compare", *words]


def begun(place, seconds=240.0):
    """A unit that has a checkpoint and is not finished, with its worker's process."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for log in place.glob("units/*/*/log.txt"):
            run, workers = log.parent, re.findall(r"Ray's worker (\d+)", log.read_text())
            if workers and checkpoints(run) and not (run / "adapter" / "curves.png").is_file():
                return run, int(workers[-1])
        time.sleep(0.02)
    raise AssertionError("no unit began")


@pytest.mark.slow
def test_a_worker_that_is_killed_changes_no_number(cluster, tmp_path):
    plain = comparing.opened(WORDS, tmp_path / "plain", seeds="0,1", budget="updates=3")
    trained(plain)
    comparing.reported(plain)
    process = subprocess.Popen(
        compare(tmp_path / "out", cluster, "0,1"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    run, worker = begun(tmp_path / "out")
    os.kill(worker, signal.SIGKILL)
    _, error = process.communicate(timeout=400)
    assert process.returncode == 0, error
    workers = re.findall(r"Ray's worker (\d+)", (run / "log.txt").read_text())
    assert len(workers) == 2 and workers[0] == str(worker), "it was taken up again by another one"
    assert "resuming after update" in (run / "log.txt").read_text()
    assert numbers(tmp_path / "out") == numbers(tmp_path / "plain")
    (fact,) = comparing.opened((), tmp_path / "out").runs
    assert fact["machine"] == "a Ray cluster of 1 node, 2 CPUs, 0 GPUs"


@pytest.mark.slow
def test_a_signal_saves_what_runs_and_the_same_command_goes_on(cluster, tmp_path):
    process = subprocess.Popen(compare(tmp_path / "out", cluster), stderr=subprocess.PIPE, text=True)
    run, _ = begun(tmp_path / "out")
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert "interrupted, saved; the same command resumes" in error
    assert "stopped" in error
    assert checkpoints(run)
    assert not children(tmp_path)
    assert subprocess.run(compare(tmp_path / "out", cluster), check=False).returncode == 0
    assert len(METHODS) == len(list((tmp_path / "out/units").glob("*/*/adapter/curves.png")))


def children(place) -> list[str]:
    """Command lines of processes that work in a folder."""
    found = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in found if f"run_dir={place}" in line]


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:1", "--ray: got '127.0.0.1:1', no cluster answers (ConnectionRefusedError: "),
        ("ray://a:10001", "--ray: got 'ray://a:10001', allowed are auto and HOST:PORT"),
        ("here", "--ray: got 'here', allowed are auto and HOST:PORT"),
        ("here:0", "--ray: got 'here:0', allowed are auto and HOST:PORT"),
    ],
)
def test_no_cluster_is_said_at_once(address, said):
    with pytest.raises(UserError) as error:
        reached(address)
    assert said in str(error.value)
