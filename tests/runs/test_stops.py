"""Being stopped, losing a reader, a peer or a reward: nothing is lost, and the exit code says what it was."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from diffalign.errors import Fault
from diffalign.runs import session
from diffalign.runs.stop import Stop
from diffalign.runtime.streams import Forgiving
from tests.kit.helpers import TINY, checkpoints, tiny_config

FEW = [*TINY, "evaluation.enabled=false", "output.checkpoint_every=1"]


HANGING = """import os, pathlib, time
n = 0
def f(media, prompts):
    global n; n += 1
    if n == 3 and {where}:
        (pathlib.Path(__file__).parent / "{file}").touch(); time.sleep(10000)
    return media.pixels.mean((1, 2, 3, 4))
"""
FAILING = """n = 0
def f(media, prompts):
    global n; n += 1
    if n >= 4: raise ConnectionError("timed out")
    return media.pixels.mean((1, 2, 3, 4))
"""


def command(folder, *more):
    return [sys.executable, "-m", "diffalign", "train", "flow_grpo/shapes-sd3", *FEW, f"run_dir={folder}", *more]


def rewards(tmp_path, code):
    (tmp_path / "r.py").write_text(code)
    return f"rewards={{{tmp_path}/r.py:f: 1}}"


def wait_for(path, process, seconds=60):
    until = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < until and process.poll() is None:
        time.sleep(0.05)
    assert path.exists()


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
    ],
)
def test_a_reward_that_never_returns_is_ended_by_the_second_signal(number, code, tmp_path):
    given = rewards(tmp_path, HANGING.format(file="hung", where="True"))
    process = subprocess.Popen(command(tmp_path / "run", given, "updates=5"), stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "hung", process)
    process.send_signal(number)
    time.sleep(1)
    assert process.poll() is None
    started = time.monotonic()
    process.send_signal(number)
    assert process.wait(10) == code
    assert time.monotonic() - started < 3
    said = process.stderr.read()
    assert "stopping after this update; asked again, at once" in said
    assert "Traceback" not in said
    assert [path.name for path in checkpoints(tmp_path / "run")][-1] == "update_000002"


def test_a_handler_sets_a_flag_and_writes_past_every_stream(monkeypatch, capfd):
    stop = Stop()
    monkeypatch.setattr(sys, "stderr", None)  # whatever it is in the middle of
    with stop.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.code == 143
    assert "stopping after this update" in capfd.readouterr().err


def test_what_is_ignored_stays_ignored_and_threads_have_no_signals():
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop().listening():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, old)
    found = []

    def work():
        with Stop().listening():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]


def test_a_run_in_a_thread_is_a_run(tmp_path):
    found = []
    made = tiny_config(tmp_path / "run", "evaluation.enabled=false")
    thread = threading.Thread(target=lambda: found.append(session.train(made, quiet=True)))
    thread.start()
    thread.join()
    assert len(found) == 1


@pytest.mark.wide
def test_a_run_whose_reader_goes_away_is_done(tmp_path):
    script = f"{' '.join(map(repr, command(tmp_path / 'run', 'updates=2')))} 2> >(head -1 > /dev/null)"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("pytorch_lora_weights.safetensors")


def test_a_stream_forgives_its_reader_and_not_a_full_disk():
    reader, writer = os.pipe()
    os.close(reader)
    stream = Forgiving(os.fdopen(writer, "w", buffering=1), all=False)
    assert stream.write("gone\n") == 5
    with open("/dev/full", "w", buffering=1) as full:
        with pytest.raises(OSError, match="No space"):
            Forgiving(full, all=False).write("x\n" * 9000)
        Forgiving(full, all=True).write("x\n")
        with pytest.raises(OSError, match="No space"):
            full.flush()
        full.buffer.raw.close()


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_terminal_without_the_letters_shows_others(encoding, tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    line = [sys.executable, "-m", "diffalign", "config", "flow_grpo/shapes-sd3", f"run_dir={tmp_path}/日本"]
    done = subprocess.run(line, capture_output=True, check=False, env=environment)
    assert done.returncode == 0
    assert rb"\u65e5\u672c" in done.stdout or "日本".encode() in done.stdout  # click takes ASCII for a mistake
    done = subprocess.run([*line, "日本=1"], capture_output=True, check=False, env=environment)
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr


def test_a_reward_that_fails_loses_nothing_and_says_where(tmp_path, monkeypatch):
    monkeypatch.setattr("diffalign.rewards.scorer.PAUSES", (0.0, 0.0))
    few = ("evaluation.enabled=false", "output.checkpoint_every=100", "updates=6", "eval_rewards=[]")
    made = tiny_config(tmp_path / "run", *few, rewards(tmp_path, FAILING))
    with pytest.raises(
        Fault, match=r"ConnectionError: timed out \(.*r.py line 4\); saved after update 3; the same command goes on"
    ):
        session.train(made, quiet=True)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["update_000003"]
    log = (tmp_path / "run" / "errors.log").read_text()
    assert "Traceback" in log
    assert "r.py" in log
    rewards(tmp_path, FAILING.replace(">= 4", "< 0"))
    session.train(made, change=True, quiet=True)


@pytest.mark.parametrize("deed", ["killed", "another config"])
def test_of_two_processes_one_fails_and_the_other_says_so(deed, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = rewards(tmp_path, HANGING.format(file="there", where="os.environ['RANK'] == '1'"))
    processes = []
    for rank in range(2):
        more = ["sampler.steps=4"] if deed == "another config" and rank == 1 else []
        place = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        line = command(tmp_path / "run", given, "eval_rewards=[]", "optimizer.micro_batch=2", "updates=5", *more)
        processes.append(subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env={**os.environ, **place}))
    if deed == "killed":
        wait_for(tmp_path / "there", processes[1], 90)
        processes[1].kill()
    codes = [process.wait(90) for process in processes]
    said = [process.stderr.read() for process in processes]
    assert not any("Traceback" in text for text in said), said
    if deed == "killed":
        assert codes == [3, -signal.SIGKILL]
        assert "another process is gone" in said[0]
    else:
        assert codes == [2, 2]
        assert all("process 1 has another config than process 0" in text and "sampler.steps" in text for text in said)
