"""What the parts of an update promise one another: a rule says what it needs, a policy does what a rule may ask for.

Shapes are `types`'s: N samples, N_t nodes at level t, D... a latent's shape.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from diffalign.types import Media, Plan, Prompts, Rollout, Schedule

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Loss:
    """A scalar to minimise and detached numbers for the log; `gap` is how far a replay is from the rollout where it
    ought to be equal: max |log-ratio|, or max |difference| of latents; `clip`: half-width of the ratio's range, where there is one."""

    value: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    gap: Tensor | None = None
    clip: float | None = None


@dataclass(frozen=True)
class Transition:
    """One step at stored latents: prediction and mean (N_t, D...), the noise's standard deviation."""

    prediction: Tensor
    mean: Tensor
    std: float


@dataclass(frozen=True)
class Replay:
    """A replayed span: x after it, mean and std of its last step (x = mean + std * eps), and the clean sample x_0 that its
    last prediction implies."""

    x: Tensor
    mean: Tensor
    std: float
    clean: Tensor


@dataclass(frozen=True)
class GraphBytes:
    """What one micro-batch takes for the gradient, in bytes: per replayed step, and for decoder and reward; `stored` is what
    a step keeps without a graph, its latent and its noise; `work`: what a gradient takes at once whatever the number of steps."""

    step: int
    reward: int
    stored: int
    work: int = 0


@dataclass(frozen=True)
class Needs:
    """What a rule cannot do without; checked before any weight is loaded.

    groups: several samples a prompt, to compare; bundle: prompts an update must have a multiple of; term_norms: the gradient norm of every
    term, in `Update.term_norms`; log_probs: those of the rollout's edges in `Scores`; graph_bytes: a call of `Rule.fit` before the first
    plan; anchored: an update even where all rewards are equal, for terms that need none; looks: a call of `Rule.look` for every term and
    micro-batch, and of `Rule.settle`, before each optimiser step; exact_steps: the rollout's steps are the network's own, as ratios and
    gradients through the chain need. False: only finished samples are used, however they were made; rewards: those that go up: False: it
    asks none; apart: groups that are sampled each by a plan of its own; adapters: names of frozen weights beside the trained ones, as
    `Policy.weights` takes them.
    """

    groups: bool = False
    bundle: int = 1
    differentiable_reward: bool = False
    stochastic_sampler: bool = False
    reference: bool = False
    term_norms: bool = False
    log_probs: bool = False
    graph_bytes: bool = False
    anchored: bool = False
    looks: bool = False
    exact_steps: bool = True
    rewards: bool = True
    apart: bool = False
    adapters: tuple[str, ...] = ()


class Policy(Protocol):
    """A sampler with trainable parameters: all that a rule may call. Gradients reach the parameters unless in a context."""

    schedule: Schedule
    micro_batch: int  # roots per forward pass
    adapts: bool  # whether that may become smaller where memory does not suffice

    def rollout(self, prompts: Prompts, plan: Plan, each: Callable[[Rollout], None] | None = None) -> Rollout: ...
    def table(self, plan: Plan, step: int) -> tuple[float, float, float]: ...
    def transition(self, part: Rollout, step: int) -> Transition: ...
    def replay(
        self, part: Rollout, start: int, stop: int, steps: Collection[int] | None = None, detached: bool = False
    ) -> Replay: ...
    def predict(self, part: Rollout, x: Tensor, time: Tensor) -> Tensor: ...
    def decode(self, part: Rollout, x: Tensor, whole: bool = False) -> Media: ...
    def reference(self) -> AbstractContextManager[None]: ...
    def weights(self, name: str, guidance: float | None = None) -> AbstractContextManager[None]: ...
    def shadow(self, name: str) -> AbstractContextManager[None]: ...
    def shifted(self, draw: int, steps: Collection[int], scale: float) -> AbstractContextManager[None]: ...
    def along(self, draw: int, steps: Collection[int]) -> Tensor: ...


BASE = "base"  # the bare model, among the names of frozen weights
START = (
    "start"  # the copy of what a run began with, or of the last reset: `Policy.reference` is that where there is one
)


class TrainablePolicy(Policy, Protocol):
    """What the trainer needs besides."""

    parameters: dict[str, Tensor]
    shadows: dict[str, dict[str, Tensor]]
    rows_forward: int
    rows_backward: int
    parts_called: int  # of networks, in rollouts with a cache
    parts_run: int  # those of them that the cache did not spare
    lossy: bool  # whether a replay may differ from a rollout in its last bits

    @property
    def exact(self) -> bool: ...

    def cached(self) -> AbstractContextManager[None]: ...
    def guided_throughout(self) -> AbstractContextManager[None]: ...
    def recomputed(self, rollout: Rollout) -> Rollout: ...
    def forget(self) -> bool: ...
    def add_shadows(self, names: Iterable[str]) -> None: ...
    def follow(self, decays: dict[str, float]) -> None: ...


RewardFunction = Callable[[Media], "Tensor"]
