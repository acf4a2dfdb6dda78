"""Units in processes of their own, with small programs in place of trainings: how many at a time, failures, signals, what is in use."""

import os
import signal
import subprocess
import sys
import threading
import time

import filelock
import pytest

from diffalign.comparing.methods import Method, Unit
from diffalign.comparing.running import LOG, Here, Runner, last_line
from diffalign.errors import Interrupted
from diffalign.runtime import launcher

BEGUN = "import pathlib, sys, time, signal; place = pathlib.Path(sys.argv[1]); (place / 'began').write_text(str(time.time()))\n"
QUICK = BEGUN + "time.sleep(0.3); (place / 'ended').write_text(str(time.time()))"
FAILS = BEGUN + "print('diffalign: no such thing'); print(); sys.exit(3)"
# As a run does: it ends with 130 when it is told to, whatever it was doing.
SAVES = (
    BEGUN.replace(
        "(place / 'began')", "signal.signal(signal.SIGINT, lambda *_: (tell(), sys.exit(130))); (place / 'began')"
    )
    + "tell = lambda: (place / 'told').open('a').write('x')\ntime.sleep(60)"
)


def units(tmp_path, count=4):
    method = Method("a rule", "a", {})
    return [Unit(method, seed, tmp_path / f"seed_{seed}") for seed in range(count)]


def runner(jobs, programs, said):
    command = lambda unit: [sys.executable, "-c", programs.get(unit.seed, QUICK), str(unit.place)]  # noqa: E731
    return Runner(jobs, said.append, Here(jobs, command))


def times(unit):
    return [float((unit.place / name).read_text()) for name in ("began", "ended")]


def test_as_many_at_a_time_as_asked_for(tmp_path):
    some = units(tmp_path)
    assert runner(2, {}, []).run(some) == {}
    spans = [times(unit) for unit in some]
    at_once = [sum(began <= moment < ended for began, ended in spans) for moment, _ in spans]
    assert max(at_once) == 2


def test_a_unit_that_fails_is_told_and_the_others_go_on(tmp_path):
    some, said = units(tmp_path, 3), []
    failed = runner(1, {1: FAILS}, said).run(some)
    assert failed == {some[1]: "diffalign: no such thing"}
    assert "a rule, seed 1: failed with code 3: diffalign: no such thing" in said
    assert [unit for unit in some if (unit.place / "ended").exists()] == [some[0], some[2]]


def wait_for(path, seconds=30.0):
    until = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.02)
    assert path.exists()


@pytest.mark.parametrize("count", [2, 3])
def test_a_signal_reaches_what_runs_once_and_begins_nothing_more(tmp_path, count):
    some, said = units(tmp_path, count), []

    def interrupt():
        for unit in some[:2]:
            wait_for(unit.place / "began")
        time.sleep(0.2)  # until it has defined what to do
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Interrupted) as ended:
        runner(2, {0: SAVES, 1: SAVES}, said).run(some)
    thread.join()
    assert ended.value.code == 130
    assert [(unit.place / "told").read_text() for unit in some[:2]] == ["x", "x"]
    assert not any(unit.place.exists() for unit in some[2:])
    assert "a rule, seed 0: stopped" in said
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_unit_in_use_is_waited_for(tmp_path):
    some, said = units(tmp_path, 1), []
    some[0].place.mkdir()
    lock = filelock.FileLock(some[0].place / ".lock", thread_local=False)
    lock.acquire()
    thread = threading.Timer(0.5, lock.release)
    thread.start()
    began = time.time()
    assert runner(1, {}, said).run(some) == {}
    thread.join()
    assert said[0] == "a rule, seed 0: in use by another process, waiting for it"
    assert times(some[0])[0] > began + 0.4


def test_threads_are_shared_out(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (unit,) = units(tmp_path, 1)
    program = "import os; print(os.environ['OMP_NUM_THREADS'], os.environ['OMP_WAIT_POLICY'])"
    runner(1, {0: program}, []).run([unit])
    assert last_line(unit.place / LOG) == f"{launcher.cpus()} passive"
    assert Here(10_000).threads == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to CPUs")
def test_cpus_of_others_are_not_counted():
    bound = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    program = "from diffalign.comparing.running import Here\nprint(Here(1).threads)"
    done = subprocess.run([sys.executable, "-c", bound + program], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
