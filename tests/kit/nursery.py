"""A process that has imported everything and forks a training run for every line it reads: `[config, override, ...]`, `--fresh` too, and
`--die=K`: killed when K things it writes are on the disk.

It answers with the child's pid, and after the child's end with its wait status. Importing takes longer than a small run does.
"""

import json
import os
import signal
import sys


def die_at(count: int) -> None:
    """Kill this process when it has synced `count` files."""
    sync, seen = os.fsync, []

    def counted(file: int) -> None:
        sync(file)
        seen.append(file)
        if len(seen) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = counted


def main() -> None:
    import accelerate.tracking
    import diffusers
    import matplotlib.pyplot
    import peft
    import tensorboard
    import torch
    import transformers

    from diffalign import config
    from diffalign.runs import session

    assert all((diffusers.StableDiffusionPipeline, diffusers.StableDiffusion3Pipeline, peft, transformers))
    assert all((accelerate.tracking, matplotlib.pyplot, tensorboard))
    torch.set_num_threads(1)
    for line in sys.stdin:
        name, *overrides = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                fresh = "--fresh" in overrides
                settings = config.load(name, [o for o in overrides if not o.startswith("--")])
                for given in overrides:
                    if given.startswith("--die="):
                        die_at(int(given.removeprefix("--die=")))
                session.train(settings, fresh=fresh, quiet=True)
                code = 0
            finally:
                os._exit(code)
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)


if __name__ == "__main__":
    main()
