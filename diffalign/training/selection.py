"""Which samples an update draws: between the prompts it is given and its rollout stands a selector.

What a selector does is a function of the prompts, of gathered scores and of its own state, so it is the same in every process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from scipy import stats

from diffalign.runtime import keys
from diffalign.runtime.randomness import Purpose, key, numpy_generator
from diffalign.types import Floats, Integers, Plan, Prompts, Scores, Term, Update, rows_by_group

FLOOR = 0.01  # of v (1 - v): a prompt that always or never passed is not written off
UNSEEN = (1.0, 1.0)  # passes and failures of a prompt before any was seen
Judge = Callable[
    [Prompts, Plan, "Sequence[str] | None"], Scores
]  # some rewards' scores of samples drawn by a plan; None: all rewards'


@dataclass(frozen=True)
class Selected:
    """What an update draws.

    scouted: how many samples were scored to find that out; seen (N,): what those drawn again had then; uneven: groups may differ in size,
    and weigh the same all the same; metrics: numbers to log.
    """

    prompts: Prompts
    scouted: int = 0
    seen: Floats | None = None
    uneven: bool = False
    metrics: dict[str, float] = field(default_factory=dict)


class Selector(Protocol):
    """Decides which samples are drawn of an update's prompts."""

    def select(self, prompts: Prompts, plan: Plan, judge: Judge) -> Selected:
        """From what was drawn of the book to what the rollout by `plan` samples."""
        ...

    def compared(self, selected: Selected, judged: Prompts, scores: Scores) -> dict[str, float]:
        """What the samples' scores say of the selection; numbers to log."""
        ...

    def after_update(self, update: Update) -> None:
        """Learn from what an update did."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What has to be kept to go on, JSON-serialisable."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        ...


class Everything:
    """All that was drawn."""

    def select(self, prompts: Prompts, plan: Plan, judge: Judge) -> Selected:
        return Selected(prompts)

    def compared(self, selected: Selected, judged: Prompts, scores: Scores) -> dict[str, float]:
        return {}

    def after_update(self, update: Update) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Scouts(Everything):
    """Of each prompt a pool of seeds is sampled in few steps and scored; the best and the worst are sampled anew, with all steps.

    What an update learns from are the second samples and their scores alone. Sol-RL, arXiv 2604.06916. Needs sampling without noise: only
    then is a sample what its seed makes of it.

    Args:
        pool: seeds a prompt, at least as many as it has samples.
        steps: of a scout, by DPM-Solver++ over the sampler's levels; as many as the sampler has: its own steps.
        rewards: those that score scouts; None: all.
    """

    def __init__(self, pool: int, steps: int, rewards: Sequence[str] | None = None) -> None:
        self.pool, self.steps, self.rewards = pool, steps, rewards

    def select(self, prompts: Prompts, plan: Plan, judge: Judge) -> Selected:
        pool = resized(prompts, {int(group): self.pool for group in prompts.group})
        scores = judge(pool, scout_plan(plan, self.steps), self.rewards)
        kept = np.concatenate([_extremes(pool, scores, rows, prompts.group) for rows in rows_by_group(pool.group)])
        seen = np.where(scores.valid, scores.total, np.nan)
        means = {keys.SCOUTED: seen, keys.SCOUTS_KEPT: seen[kept]}
        metrics = {name: float(np.nanmean(of)) for name, of in means.items() if np.isfinite(of).any()}
        if missing := int((~scores.valid).sum()):
            metrics[keys.SCOUTS_INVALID] = float(missing)
        return Selected(pool.select(kept), len(pool), seen[kept], metrics=metrics)

    def compared(self, selected: Selected, judged: Prompts, scores: Scores) -> dict[str, float]:
        """How far scouts and second samples agree on the order within prompts."""
        assert selected.seen is not None
        second = np.where(scores.valid, scores.total, np.nan)
        found = [rank_correlation(selected.seen[rows], second[rows]) for rows in rows_by_group(judged.group)]
        known = [value for value in found if value is not None]
        return {keys.SCOUTS_RANK: float(np.mean(known))} if known else {}


class Allocation(Everything):
    """As many samples in all, but more of prompts whose outcome is uncertain: the share of one that passes with rate v goes with
    sqrt(v (1 - v) + e), as Neyman has it for the least variance. Each group weighs the same, whatever its size.

    v is the mean of a prompt's scores so far, each in [0, 1] by the least and the largest score of the run, older ones decayed.

    Args:
        least, most: samples of a prompt; unit: divides them, and so the number of every group.
        decay: of what was seen of a prompt, each time it is drawn.
    """

    def __init__(self, least: int, most: int, decay: float, unit: int = 1) -> None:
        self.least, self.most, self.decay, self.unit = least, most, decay, unit
        self.passed: dict[str, tuple[float, float]] = {}  # prompt -> passes and failures, decayed
        self.range: tuple[float, float] | None = None  # of scores so far

    def rate(self, prompt: str) -> float:
        """What is thought of a prompt's pass rate; 1/2 before it was seen."""
        passes, failures = self.passed.get(prompt, UNSEEN)
        return passes / (passes + failures)

    def select(self, prompts: Prompts, plan: Plan, judge: Judge) -> Selected:
        own = rows_by_group(prompts.group)
        rates = np.array([self.rate(prompts.text[rows[0]]) for rows in own])
        spread = np.sqrt(rates * (1 - rates) + FLOOR)
        sizes = allocated(spread, len(prompts), self.least, self.most, self.unit)
        drawn = resized(prompts, {int(prompts.group[r[0]]): int(n) for r, n in zip(own, sizes, strict=True)})
        found = {keys.FEWEST: sizes.min(), keys.MOST: sizes.max(), keys.PASS_RATE: rates.mean()}
        return Selected(drawn, uneven=True, metrics={name: float(value) for name, value in found.items()})

    def after_update(self, update: Update) -> None:
        """Count passes and failures of what was scored."""
        if update.judged is None or not update.judged[1].valid.any():
            return
        prompts, scores = update.judged
        total, valid = scores.total, scores.valid
        seen = [*(self.range or ()), *total[valid].tolist()]
        self.range = low, high = min(seen), max(seen)
        passed = (total - low) / (high - low) if high > low else np.full(len(total), 0.5)
        for rows in rows_by_group(prompts.group):
            own = passed[rows][valid[rows]]
            text = prompts.text[rows[0]]
            passes, failures = (self.decay * value for value in self.passed.get(text, UNSEEN))
            if len(own):
                self.passed[text] = passes + float(own.sum()), failures + float((1 - own).sum())

    def state_dict(self) -> dict[str, Any]:
        return {"passed": {text: list(counts) for text, counts in self.passed.items()}, "range": self.range}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.passed = {text: (a, b) for text, (a, b) in state.get("passed", {}).items()}
        kept = state.get("range")
        self.range = None if kept is None else (kept[0], kept[1])


def allocated(spread: Floats, total: int, least: int, most: int, unit: int) -> Integers:
    """Numbers of samples (G,) that add up to `total`, multiples of `unit` in [least, most], for which the sum of spread^2 / number, the
    variance of the mean over groups, is the least: each next unit goes where it takes most off. Equal spreads have equal numbers, where
    these exist."""
    sizes = np.full(len(spread), least, dtype=np.int64)
    for _ in range((total - int(sizes.sum())) // unit):
        gain = spread**2 * (1 / sizes - 1 / (sizes + unit))
        sizes[int(np.argmax(np.where(sizes < most, gain, -1.0)))] += unit
    return sizes


def scout_plan(plan: Plan, count: int) -> Plan:
    """Sampling to the end in `count` evenly spread steps of a plan's, by the same network, without noise; latents between are not kept."""
    steps = len(plan.noise)
    solver = tuple(k * steps // count for k in range(count)) if count < steps else ()
    finished = Term(steps, steps, "forward")
    return replace(Plan.deterministic(steps), updates=((finished,),), sampled_by=plan.sampled_by, solver=solver)


def resized(prompts: Prompts, sizes: Mapping[int, int]) -> Prompts:
    """The same prompts with other numbers of samples by group: a group's first ones, and beyond what it has further ones with seeds of
    their own."""
    rows: list[int] = []
    seeds: list[int] = []
    for own in rows_by_group(prompts.group):
        first = own[0]
        more = max(0, sizes[int(prompts.group[first])] - len(own))
        own = own[: sizes[int(prompts.group[first])]]
        rows += [*own.tolist(), *[int(first)] * more]
        shared = int(prompts.group_seed[first])
        seeds += [*prompts.seed[own].tolist(), *(key(shared, Purpose.FURTHER, k) for k in range(more))]
    return replace(prompts.select(rows), seed=np.array(seeds, dtype=np.int64))


def extremes(total: Floats, valid: Any, count: int, rng: np.random.Generator) -> Integers:
    """Rising indices of the `count` samples that are kept of a group's (M,): as many of the best as of the worst, one more of the best
    where the number is odd; equal ones by lot, and those without a score only where there are too few others."""
    lot = rng.permutation(len(total))
    scored, rest = lot[valid[lot]], lot[~valid[lot]]
    ranked = scored[np.argsort(total[scored], kind="stable")]
    worst = min(count // 2, len(ranked))
    best = min(count - count // 2, len(ranked) - worst)
    kept = np.concatenate([ranked[:worst], ranked[len(ranked) - best :]])
    if len(kept) < count:
        kept = np.concatenate([ranked, rest])[:count]
    return np.sort(kept)


def rank_correlation(first: Floats, second: Floats) -> float | None:
    """Spearman's, over samples with both scores; None where one of the two is the same for all."""
    both = np.isfinite(first) & np.isfinite(second)
    first, second = first[both], second[both]
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(stats.spearmanr(first, second).statistic)


def _extremes(pool: Prompts, scores: Scores, rows: Integers, group: Integers) -> Integers:
    """Rows of a pool that are kept of one group's."""
    count = int((group == pool.group[rows[0]]).sum())
    rng = numpy_generator(int(pool.group_seed[rows[0]]), Purpose.LOT)
    return rows[extremes(scores.total[rows], scores.valid[rows], count, rng)]


def selector(scouts: Any, allocate: Any, micro_batch: int) -> Selector:
    """What a config's `prompts` asks for."""
    if allocate is not None:
        return Allocation(allocate.least, allocate.most, allocate.decay, micro_batch)
    return Everything() if scouts is None else Scouts(scouts.pool, scouts.steps, scouts.rewards)
