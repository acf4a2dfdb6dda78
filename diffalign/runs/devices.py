"""What a run's config asks of the machine, held against what is there."""

from __future__ import annotations

import torch

from diffalign import config as configs
from diffalign.config import Config
from diffalign.errors import UserError
from diffalign.models import quantizing
from diffalign.models.recordings import Tools
from diffalign.runtime.device import one_order
from diffalign.runtime.distributed import World
from diffalign.runtime.launcher import several


def device(config: Config) -> str:
    """The device a config asks for.

    Raises:
        UserError: if it is not there.
    """
    kind, _, number = config.device.partition(":")
    count, apple = torch.cuda.device_count(), torch.backends.mps.is_available()
    there = [*(["cuda"] if count else []), *(["mps"] if apple else []), "cpu"]
    if kind == "auto":
        return there[0]
    if kind not in there:
        what = "CUDA device" if kind == "cuda" else "Apple GPU"
        raise UserError(f"device: got {config.device!r}, torch sees no {what}; allowed here is {', '.join(there)}")
    if number and int(number) >= count:
        raise UserError(
            f"device: got {config.device!r}, torch sees {count} CUDA devices; allowed are cuda:0 to cuda:{count - 1}"
        )
    if number and several():
        raise UserError(
            f"device: got {config.device!r}, of several processes each has a device of its own; allowed is cuda"
        )
    if number:
        torch.cuda.set_device(int(number))
    # The process's own, without a number: `World.join` chose it.
    return kind


def check(config: Config, world: World) -> None:
    """Hold a config against the device and the processes that are to run it.

    Raises:
        UserError: if the device cannot do what is asked, or processes would have nothing to do, or could not hold a network together.
    """
    where = device(config)
    quantizing.check(config.memory.quantize, where)
    if config.speed == "graphs" and where != "cuda":
        raise UserError("speed: got graphs, which needs a CUDA device; allowed here are auto, eager, compile")
    if config.speed == "graphs" and config.memory.shard != "none":
        raise UserError(
            "speed: got graphs, a network that processes share is gathered anew for each call; allowed are auto, eager"
        )
    if config.deterministic is True:
        one_order(where)
    micro, samples, size = config.micro_batch, config.samples_per_update, world.size
    if samples // micro < size:
        raise UserError(
            f"optimizer.micro_batch: got {micro}, {samples // micro} of them an update for {size} processes; allowed is at least one each"
        )
    rule = config.make_rule()
    if rule.needs.apart:
        _check_apart(config.prompts.group_size, micro if config.memory.shard != "none" else 0, size)
    data = rule.anchored_in
    if data is not None and data.count < size:
        raise UserError(f"rule.data.count: got {data.count} for {size} processes; allowed is at least one each")
    if config.memory.shard == "none":
        return
    if data is not None and (uneven := [key for key in ("count", "rows") if getattr(data, key) % (micro * size)]):
        raise UserError(
            f"rule.data.{uneven[0]}: got {getattr(data, uneven[0])}, with memory.shard all {size} processes run the network equally often; "
            f"allowed are multiples of {micro * size}"
        )
    if size == 1:
        raise UserError(
            "memory.shard: got blocks, one process has nobody to share with; allowed is none, or torchrun with more"
        )
    if samples % (micro * size):  # they must run the network equally often
        raise UserError(
            f"optimizer.micro_batch: got {micro}, with memory.shard each of {size} processes has {samples / size:g} of an update's samples "
            "and as many micro-batches as the others; allowed are divisors of that"
        )


def _check_apart(group: int, micro: int, size: int) -> None:
    """That each process has some of every group; micro: samples at a time of processes that run the network equally often, else 0."""
    of, each = "rule.window_by: prompt", max(1, micro) * size
    if group % each if micro else group < size:
        allowed = f"multiples of {each}" if micro else f"{size} or more"
        raise UserError(
            f"prompts.group_size: got {group}, with {of} {size} processes share every group; allowed are {allowed}"
        )


def agreed(config: Config, world: World) -> None:
    """Hold the processes' configs against each other.

    Raises:
        UserError: in every process, if one has another config than the first.
    """
    gathered = world.gather((configs.settings(config), config.book.content))
    for rank, (other, content) in enumerate(gathered):
        if (other, content) != gathered[0]:
            lines = [f"  {key}: {a!r} -> {b!r}" for key, (a, b) in configs.differences(gathered[0][0], other).items()]
            raise UserError(f"process {rank} has another config than process 0", *(lines or ["  other prompts"]))


def recorder(config: Config) -> Tools | None:
    """What records the networks' calls, if they are recorded; see `models.graphs`."""
    wanted = config.speed in ("auto", "graphs") and config.memory.shard == "none"
    return Tools() if wanted and device(config) == "cuda" else None


def compiled(config: Config) -> bool:
    """Whether the networks' blocks are compiled."""
    return config.speed == "compile"


def promise(config: Config) -> list[str]:
    """What a run says of its bits, where that is not what a run on a CPU promises."""
    if device(config) == "cpu":
        return []
    if config.deterministic is True:
        return ["deterministic: true: repeated or resumed on this device, this run gives the same bits"]
    return [
        "deterministic: auto, which on this device is false: repeated or resumed, this run is equal to rounding, not bit for bit"
    ]
