"""Rollouts and their scores: what an update samples, asked of the rewards a micro-batch at a time and joined over processes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from diffalign.protocols import TrainablePolicy
from diffalign.rewards import distances
from diffalign.rewards.base import check_media
from diffalign.rewards.scorer import Scorer
from diffalign.rules import Rule, RuleSettings, shares, units
from diffalign.runtime import keys
from diffalign.runtime.progress import Progress, silent
from diffalign.types import Floats, Integers, Plan, Prompts, Rollout, Scores, Tree, chunks

Metrics = dict[str, float]
BLANK = 0.01  # of contrast: one colour and what a decoder makes of it


@dataclass
class Clock:
    """Seconds by phase."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @classmethod
    def of(cls, policy: TrainablePolicy) -> Clock:
        """A clock for what a policy's device does."""
        return cls(next(iter(policy.parameters.values())).device)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds[phase] += time.perf_counter() - started


@dataclass(frozen=True)
class Appearance:
    """What samples look like, whatever their rewards say: thumbnails (n, d), contrast (n,), root mean square of latents (n,)."""

    thumbnails: Floats
    contrast: Floats
    latent: Floats


@dataclass
class Sampling:
    """Samples by a policy and asks a scorer.

    log_probs: whether scores carry the log-probs of the rollout's edges.
    """

    policy: TrainablePolicy
    scorer: Scorer
    log_probs: bool = False
    progress: Progress = silent
    _appearance: list[tuple[torch.Tensor, ...]] = field(
        default_factory=list
    )  # of what was decoded last, by micro-batch

    def run(self, prompts: Prompts, plan: Plan, clock: Clock) -> tuple[Rollout, Scores | None]:
        """Sample and, where the plan wants that, score: rewards in the background work while the next micro-batch is sampled."""
        begun: list[Callable[[], Scores]] = []
        self._appearance = []
        whole = plan.scored
        count, parts = 0, -(-len(prompts) // self.policy.micro_batch)

        def each(part: Rollout) -> None:
            nonlocal count
            count += 1
            self.progress("sampling", count, parts)
            if whole:
                self._begin(begun, clock, part)

        self.progress("sampling", 0, parts)
        before = dict(clock.seconds)
        with clock("sample"):
            rollout = self.policy.rollout(prompts, plan, each)
        clock.seconds["sample"] -= sum(clock.seconds[p] - before.get(p, 0.0) for p in ("decode", "reward"))
        return rollout, self._joined(rollout, begun, clock) if whole else None

    def score(self, rollout: Rollout, clock: Clock) -> Scores:
        """Decode and score the leaves of a rollout, a micro-batch at a time."""
        begun: list[Callable[[], Scores]] = []
        self._appearance = []
        for rows in chunks(len(rollout.prompts), self.policy.micro_batch):
            self._begin(begun, clock, rollout.select(rows))
        return self._joined(rollout, begun, clock)

    def appearance(self) -> Appearance:
        """Of what was sampled last, read off the device at once."""
        return Appearance(*(torch.cat(each).double().cpu().numpy() for each in zip(*self._appearance, strict=True)))

    def _begin(self, begun: list[Callable[[], Scores]], clock: Clock, part: Rollout) -> None:
        """Decode a micro-batch and begin to score it."""
        with clock("decode"), torch.no_grad():
            media = check_media(self.policy.decode(part, part.x[-1]))
            latent = part.x[-1].flatten(1).float().square().mean(1).sqrt()
            self._appearance.append((distances.small(media.pixels), distances.contrast(media.pixels), latent))
        with clock("reward"):
            begun.append(self.scorer.begin(media, part.at(-1)))

    def _joined(self, rollout: Rollout, begun: list[Callable[[], Scores]], clock: Clock) -> Scores:
        """Wait for the scores of a rollout's micro-batches."""
        self.progress("scoring", 0, 0)
        with clock("reward"):
            parts = [answer() for answer in begun]
            self.scorer.rest()
        steps = range(rollout.plan.stop) if self.log_probs else ()
        return Scores(
            {name: np.concatenate([part.by_name[name] for part in parts]) for name in self.scorer.rewards},
            np.concatenate([part.total for part in parts]),
            np.concatenate([part.valid for part in parts]),
            self.scorer.weights,
            [_edges(rollout, step) for step in steps] or None,
        )


def appearances(by_process: list[tuple[list[int], Appearance]], tree: Tree, group: Integers) -> Metrics:
    """What all samples look like on average, from every process's and the rows they are of.

    How far they are from others of their group, ids (N,), see `distances.diversity`, is not there where all are alone in theirs.
    """

    def whole(name: str) -> Floats:
        return joined([(rows, getattr(found, name)) for rows, found in by_process], tree)

    apart = distances.diversity(whole("thumbnails"), group)
    diversity = {keys.DIVERSITY: float(np.nanmean(apart))} if np.isfinite(apart).any() else {}
    blank = float((whole("contrast") < BLANK).mean())
    return {**diversity, keys.BLANK: blank, keys.LATENT: float(whole("latent").mean())}


def joined(by_process: Sequence[tuple[list[int], Floats]], tree: Tree, level: int = -1) -> Floats:
    """What every process found of the nodes of a level (n, ...), and the rows it has, put in the tree's order (N_t, ...)."""
    found = np.concatenate([values for _, values in by_process])
    whole = np.empty_like(found)
    whole[tree.nodes([row for rows, _ in by_process for row in rows])[level]] = found
    return whole


def joined_scores(by_process: list[tuple[list[int], Scores]], tree: Tree) -> Scores:
    """The scores of all samples from those of every process and the rows they are of."""
    if len(by_process) == 1:
        return by_process[0][1]
    parts = [scores for _, scores in by_process]

    def put(level: int, values: Sequence[np.ndarray]) -> np.ndarray:
        return joined([(rows, own) for (rows, _), own in zip(by_process, values, strict=True)], tree, level)

    steps = range(len(parts[0].log_prob or ()))
    return Scores(
        {name: put(-1, [part.by_name[name] for part in parts]) for name in parts[0].by_name},
        put(-1, [part.total for part in parts]),
        put(-1, [part.valid for part in parts]),
        parts[0].weights,
        [put(step + 1, [(part.log_prob or [])[step] for part in parts]) for step in steps] or None,
    )


def _edges(rollout: Rollout, step: int) -> Floats:
    """Log-probs of a step's edges (N_{t+1},), 0 where it is deterministic."""
    stored = rollout.log_prob[step]
    return np.zeros(len(rollout.tree.parent[step])) if stored is None else stored.double().cpu().numpy()


def measured(
    rule: Rule,
    judge: Callable[[Prompts, Plan], Scores | None],
    prompts: Prompts,
    steps: int,
    notify: Callable[[str], None],
) -> dict[str, float]:
    """What a rule's rewards are divided by: their spread in samples of some prompts by the model as it is.

    judge: scores some prompts' samples of so many steps, by every reward.

    Raises:
        UserError: if a reward has no spread.
    """
    scores = judge(prompts, Plan.deterministic(steps))
    assert scores is not None, "units are of samples to the end"
    found = units(scores, prompts.group, rule.least)
    said = ", ".join(f"{name} by {unit:.4g}" for name, unit in found.items())
    notify(f"rule.unit: auto: divided {said}, the mean std within the first update's prompts")
    return found


def describe(scores: Scores, group: Integers, settings: RuleSettings) -> Metrics:
    """Mean of every reward over valid samples, what share each of several has of the advantages, the share of valid samples, and of groups
    (of the samples' ids) without spread; settings: the rule's."""
    valid = scores.valid
    metrics = {keys.VALID: float(valid.mean()), keys.TOTAL: float(scores.total[valid].mean())}
    metrics |= {keys.reward(name): float(values[valid].mean()) for name, values in scores.by_name.items()}
    metrics |= {keys.share(name): value for name, value in shares(scores, group, settings).items()}
    missing = {name: float((~np.isfinite(values)).sum()) for name, values in scores.by_name.items()}
    metrics |= {keys.invalid(name): count for name, count in missing.items() if count}
    spread = [np.ptp(scores.total[(group == g) & valid]) if ((group == g) & valid).any() else 0.0 for g in set(group)]
    metrics["groups_flat"] = float(np.mean(np.asarray(spread) == 0))
    return metrics
