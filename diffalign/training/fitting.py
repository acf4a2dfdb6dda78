"""Bytes that autograd keeps, counted by hooks: the same on every device, and without the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from diffalign.rewards.base import Reward
from diffalign.types import FittingRule, GraphBytes, Plan, Prompts, TrainablePolicy, UpdateRule


class Saved:
    """A context that adds up the storages autograd saves in it, each once; parameters are not counted, they are there anyway.

    total: bytes of what is alive now; peak: the most that was.
    """

    def __init__(self) -> None:
        self.total = self.peak = 0
        self._held: dict[int, int] = {}  # storage -> how many saved tensors use it
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor)

    def __enter__(self) -> Saved:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> _Held:
        storage = tensor.untyped_storage()
        owner = tensor if tensor._base is None else tensor._base
        counted = not isinstance(owner, torch.nn.Parameter)
        held = _Held(tensor, self, storage.data_ptr() if counted else 0, storage.nbytes())
        if counted:
            if not self._held.get(held.address):
                self.total += held.size
                self.peak = max(self.peak, self.total)
            self._held[held.address] = self._held.get(held.address, 0) + 1
        return held

    def release(self, address: int, size: int) -> None:
        """One saved tensor less on a storage."""
        self._held[address] -= 1
        if not self._held[address]:
            self.total -= size


class _Held:
    """A saved tensor; autograd drops it when the graph that needs it goes."""

    def __init__(self, tensor: Tensor, counter: Saved, address: int, size: int) -> None:
        self.tensor, self.counter, self.address, self.size = tensor, counter, address, size

    def __del__(self) -> None:
        if self.address:
            self.counter.release(self.address, self.size)


def saved_bytes(work: Callable[[], Any]) -> int:
    """What the graph of some work's result keeps."""
    with Saved() as saved:
        result = work()
        size = saved.total
    del result
    return size


def fit(rule: UpdateRule, policy: TrainablePolicy, rewards: dict[str, Reward], batch: Prompts) -> bool:
    """Tell a rule that asks for it what graphs a micro-batch holds; returns whether it did."""
    if rule.needs.graph_bytes:
        cast(FittingRule, rule).fit(graph_bytes(policy, rewards, batch), policy.schedule.steps)
    return rule.needs.graph_bytes


def graph_bytes(policy: TrainablePolicy, rewards: dict[str, Reward], prompts: Prompts) -> GraphBytes:
    """What the last step, and decoder and rewards after it, keep for the gradient of one batch of prompts."""
    steps = policy.schedule.steps
    part = policy.rollout(prompts, Plan.deterministic(steps))

    def judged() -> Tensor:
        media = policy.decode(part, policy.replay(part, steps - 1, steps).x)
        return torch.stack([torch.as_tensor(reward(media, prompts)).sum() for reward in rewards.values()])

    one = saved_bytes(lambda: policy.replay(part, steps - 1, steps))
    two = saved_bytes(lambda: policy.replay(part, steps - 2, steps))
    latent = part.x[0]
    # A step whose input carries gradient keeps more than the first one.
    return GraphBytes(two - one, saved_bytes(judged) - one, 2 * latent.numel() * latent.element_size())
