"""What `auto` becomes on the device at hand: attention by trials, how networks run and how many samples at a time by the clock.

A choice that changes bits is written into the run's config, so that a resumed run goes on with it; one that changes none is made anew.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from diffalign.backends.diffusers import DiffusersPolicy
from diffalign.config import Config
from diffalign.runs import devices
from diffalign.runs.resume import with_kept
from diffalign.runtime import remembered, trials
from diffalign.runtime.distributed import World
from diffalign.runtime.memory import out_of_memory, release
from diffalign.types import Plan, Prompts

Say = Callable[[str], None]
PAYS = 0.95  # a doubled micro-batch is taken if a row takes less than this share of the time it took
SECONDS = 60.0  # that timing takes at most
OWN = ("_native_flash", "_native_efficient", "_native_math")  # among these torch chooses by itself, see `device.settle`


def attention(config: Config, world: World, say: Say) -> Config:
    """The config with its attention decided.

    Raises:
        Fault: if no kernel of the card is right.
    """
    if config.attention != "auto":
        return config
    where = devices.device(config)
    found = world.lead(lambda: _right_one(torch.cuda.get_device_name(), say)) if where == "cuda" else "native"
    return with_kept(config, {"attention": found})


def _right_one(card: str, say: Say) -> str:
    key = f"attention: {card}, torch {torch.__version__}"
    found = remembered.recall(key)
    if not isinstance(found, str):
        say(f"{card}: trying its attention kernels, once")
        found = trials.right_one(trials.all_tried(), OWN)
        remembered.remember(key, found, say)
    if found != "native":
        say(
            f"attention: auto, here {found}: of torch's own choices one is wrong on this card; see `diffalign doctor --card`"
        )
    return found


def timed(config: Config, policy: DiffusersPolicy, world: World, say: Say) -> Config:
    """The config with its micro-batch decided, and the policy told; where `speed` is auto, recordings stay on if they are faster."""
    if devices.device(config) == "cuda" and config.memory.shard == "none":
        micro_batch = world.lead(lambda: _by_clock(config, policy, world, say))
        if world.size > 1:  # what the first process found
            micro_batch, graphs = world.gather((micro_batch, bool(policy.graphs and policy.graphs[0].on)))[0]
            if not graphs:
                policy.forget()
    else:
        micro_batch = config.micro_batch
    policy.micro_batch = micro_batch
    return with_kept(config, {"optimizer.micro_batch": micro_batch})


def _by_clock(config: Config, policy: DiffusersPolicy, world: World, say: Say) -> int:
    free = config.optimizer.micro_batch == "auto" and not config.make_rule().needs.differentiable_reward
    either = config.speed == "auto" and bool(policy.graphs)
    if not free and not either:
        return config.micro_batch
    key = f"speed: {_circumstances(config)}"
    kept = remembered.recall(key)
    if not (isinstance(kept, dict) and kept.keys() == {"micro_batch", "graphs"}):
        clock = Stopwatch(config, policy)
        tried = candidates(config.micro_batch, config.samples_per_update, world.size) if free else [config.micro_batch]
        sizes = [size for size in tried if config.divided % size == 0]
        size, seconds = largest_that_pays(clock, sizes)
        graphs = either and seconds < clock(size, recorded=False)
        kept = {"micro_batch": size, "graphs": graphs}
        clock.done()
        if math.isfinite(seconds):
            remembered.remember(key, kept, say)
            say(f"timed in {clock.spent:.0f} s: {seconds * 1000:.0f} ms for a sampling step and a term of one sample")
    if either and not kept["graphs"]:
        policy.forget()
    say(f"auto, here micro-batches of {kept['micro_batch']}{', calls recorded' * kept['graphs']}")
    return int(kept["micro_batch"])


def _circumstances(config: Config) -> str:
    """What the times depend on, as far as a config and the machine say it."""
    sampler = config.sampler
    call = {key: value for key, value in sampler.pipeline_args.items() if isinstance(value, (int, float))}
    facts: list[Any] = [torch.cuda.get_device_name(), torch.__version__, config.model, config.weights, call]
    facts += [sampler.guidance_scale, config.lora.rank, config.lora.targets, config.precision, config.memory.quantize]
    facts += [
        config.checkpoint,
        config.attention,
        config.speed,
        config.optimizer.micro_batch,
        config.samples_per_update,
        *([] if config.divided == config.samples_per_update else [config.divided]),
    ]
    facts += [config.make_rule().needs.reference, config.deterministic]
    return ", ".join(map(str, facts))


def candidates(first: int, samples: int, processes: int) -> list[int]:
    """Micro-batches to try, ascending: `first` and its doublings that divide an update's samples and leave every process one."""
    doubled = (first * 2**k for k in range(20))
    return [size for size in doubled if samples % size == 0 and samples // size >= processes] or [first]


def largest_that_pays(seconds: Callable[[int], float], sizes: Sequence[int]) -> tuple[int, float]:
    """The size up to which each next one still makes a sample cheaper, and what a sample takes with it.

    seconds: size -> seconds a sample, infinite where it does not fit or there is no time left to find out; sizes: ascending.
    """
    best, least = sizes[0], seconds(sizes[0])
    for size in sizes[1:]:
        now = seconds(size)
        if not now < PAYS * least:
            break
        best, least = size, now
    return best, least


class Stopwatch:
    """How long a sampling step and a term with its gradient take, a sample; what it leaves behind is given back by `done`."""

    def __init__(self, config: Config, policy: DiffusersPolicy, rounds: int = 2, warm: int = 2) -> None:
        self.config, self.policy, self.rounds, self.warm = config, policy, rounds, warm
        self.before = policy.micro_batch, policy.rows_forward, policy.rows_backward
        self.spent = 0.0

    def __call__(self, size: int, recorded: bool = True) -> float:
        """Seconds a sample with micro-batches of `size`; infinite where memory or time does not suffice."""
        if self.spent > SECONDS / 2:  # the next one takes as long as all before it
            return math.inf
        started = time.perf_counter()
        for graphs in self.policy.graphs:
            graphs.clear()
            graphs.on = recorded
        self.policy.micro_batch = size
        try:
            return self._measured(size)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return math.inf
        finally:
            self._tidy()
            self.spent += time.perf_counter() - started

    def _measured(self, size: int) -> float:
        prompts, settings = self.config.book, self.config.prompts
        drawn = prompts.draw(settings.groups, settings.group_size, self.config.seed, 0).select(range(size))
        with self.policy.guided_throughout():  # no step takes more memory
            for _ in range(self.warm):  # calls are recorded when they come a second time
                self._once(drawn)
            started = _now()
            for _ in range(self.rounds):
                self._once(drawn)
            return (_now() - started) / self.rounds / size

    def _once(self, prompts: Prompts) -> None:
        """A step of sampling and a term, as far as the network goes: a rule's own arithmetic is next to nothing."""
        part = self.policy.rollout(prompts, Plan(1, (False,) * self.policy.schedule.steps, ()))
        self.policy.transition(part, 0).prediction.float().square().mean().backward()

    def _tidy(self) -> None:
        for parameter in self.policy.parameters.values():
            parameter.grad = None
        release()

    def done(self) -> None:
        """Give recordings back, and the policy its numbers."""
        for graphs in self.policy.graphs:
            graphs.clear()
            graphs.on = True
        self.policy.micro_batch, self.policy.rows_forward, self.policy.rows_backward = self.before
        self._tidy()


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
