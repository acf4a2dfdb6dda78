"""The command line in processes that need not import again: forks of one that has. Importing takes longer than most commands do."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.kit import ROOT

Done = subprocess.CompletedProcess


@functools.cache
def _warm() -> subprocess.Popen[str]:
    """The process that forks, one for each of pytest's."""
    place = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.kit.commands"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=place,
    )
    atexit.register(process.kill)
    return process


def diffalign(*arguments: str, cwd: Path = ROOT, timeout: float = 300, env: dict[str, str] | None = None) -> Done[str]:
    """`diffalign ARGUMENTS` in a process of its own; what it printed and its exit code."""
    process = _warm()
    assert process.stdin is not None and process.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        out, error = Path(folder) / "out", Path(folder) / "error"
        wish = {"arguments": arguments, "cwd": str(cwd), "env": env or dict(os.environ), "timeout": timeout}
        process.stdin.write(json.dumps({**wish, "out": str(out), "error": str(error)}) + "\n")
        process.stdin.flush()
        code = int(process.stdout.readline())
        return Done(["diffalign", *arguments], code, out.read_text(), error.read_text())


def _child(wish: dict) -> None:
    """What `python -m diffalign` does, from here on."""
    import signal

    os.chdir(wish["cwd"])
    os.environ.clear()
    os.environ.update(wish["env"])
    for number, name, flags in ((0, os.devnull, os.O_RDONLY), (1, wish["out"], 577), (2, wish["error"], 577)):
        handle = os.open(name, flags, 0o666)  # 577: write, create, empty
        os.dup2(handle, number)
        os.close(handle)
    for number, stream in ((1, "stdout"), (2, "stderr")):
        setattr(sys, stream, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115
    signal.alarm(int(wish["timeout"]))
    from diffalign.cli import main

    sys.argv = ["diffalign", *wish["arguments"]]
    main(wish["arguments"])


def _serve() -> None:
    import diffusers
    import matplotlib.pyplot
    import torch

    from diffalign.evaluation import suite
    from diffalign.planning import cost
    from diffalign.runs import session
    from diffalign.sampling import pictures

    assert all((diffusers.StableDiffusionPipeline, diffusers.StableDiffusion3Pipeline, matplotlib.pyplot))
    assert all((suite, cost, session, pictures))
    torch.set_num_threads(1)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                _child(json.loads(line))
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
