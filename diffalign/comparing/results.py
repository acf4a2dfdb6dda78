"""What a comparison found, as records: methods, pairs of them, what a score costs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from diffalign.comparing import statistics, units
from diffalign.comparing.comparison import Comparison
from diffalign.comparing.methods import Method, Unit
from diffalign.comparing.statistics import Cost, Difference
from diffalign.comparing.units import Found
from diffalign.errors import Fault, UserError
from diffalign.evaluation import intervals
from diffalign.evaluation.intervals import Interval
from diffalign.runtime import keys

KINDS = tuple(keys.SPENT)


@dataclass(frozen=True)
class Judged:
    """A judge's view of a method. value, gain: with intervals over seeds; gain_prompts: with one over prompts, of these seeds alone."""

    value: Interval
    gain: Interval
    gain_prompts: Interval


@dataclass(frozen=True)
class MethodResult:
    """found: its units that came to their end; left_out: why others did not count; spent: means over units, at the end."""

    method: Method
    found: tuple[Found, ...]
    left_out: dict[int, str]
    judges: dict[str, Judged]
    reward_final: float | None
    reward_best: float | None
    updates: float | None
    spent: dict[str, float]
    memory_gib: float | None

    @property
    def label(self) -> str:
        """Its name."""
        return self.method.label

    @property
    def seeds(self) -> list[int]:
        """Those that came to their end."""
        return [each.unit.seed for each in self.found]


@dataclass(frozen=True)
class Pair:
    """Two methods by one judge. p: Holm's, over all pairs by that judge; prompts: the difference with its interval over prompts, where
    there is one seed of each; reason: why they cannot be compared, empty where they can."""

    judge: str
    first: str
    second: str
    difference: Difference
    p: float
    prompts: Interval | None = None
    reason: str = ""

    @property
    def resolved(self) -> bool:
        """Whether they are told apart."""
        return self.p < statistics.LEVEL

    @property
    def better(self) -> str:
        """The one with the higher score."""
        return self.first if self.difference.value.value >= 0 else self.second


@dataclass(frozen=True)
class Target:
    """A judge's score; costs: by method and kind."""

    judge: str
    score: float
    costs: dict[str, dict[str, Cost]]


@dataclass(frozen=True)
class Results:
    """Everything that was found; judges: by name, the first decides what is best."""

    comparison: Comparison
    judges: tuple[str, ...]
    methods: tuple[MethodResult, ...]
    pairs: tuple[Pair, ...]
    target: Target | None
    failed: Mapping[Unit, str]

    def best(self, judge: str) -> str | None:
        """The method that is told apart from every other by a judge, and above them; None if there is none."""
        for method in self.methods:
            own = [p for p in self.pairs if p.judge == judge and method.label in (p.first, p.second)]
            if len(own) == len(self.methods) - 1 > 0 and all(p.resolved and p.better == method.label for p in own):
                return method.label
        return None


def collect(comparison: Comparison, failed: Mapping[Unit, str] | None = None) -> Results:
    """Read what units left; failed: what those said that failed just now.

    Raises:
        Fault: if no unit came to its end.
        UserError: if the target names no judge.
    """
    failed = failed or {}
    found: dict[str, dict[int, Found | str]] = {method.label: {} for method in comparison.methods}
    for unit in comparison.units:
        said = units.read(unit)
        found[unit.method.label][unit.seed] = f"failed: {failed[unit]}" if unit in failed else said
    whole = [each for by_seed in found.values() for each in by_seed.values() if isinstance(each, Found)]
    if not whole:
        why = [f"{label}, seed {seed}: {said}" for label, by_seed in found.items() for seed, said in by_seed.items()]
        raise Fault(f"no unit came to its end: {'; '.join(map(str, why))}")
    judges = _judges(whole)
    methods = tuple(_method(method, found[method.label], judges) for method in comparison.methods)
    pairs = tuple(pair for judge in judges for pair in _pairs(methods, judge))
    return Results(comparison, judges, methods, pairs, _target(comparison, methods, judges), failed)


def _judges(found: Sequence[Found]) -> tuple[str, ...]:
    """Names of the judges that every unit has."""
    every = [set(evaluation.scores) for each in found for evaluation in each.evaluations.values()]
    return tuple(name for name in found[0].evaluations[0].scores if all(name in names for names in every))


def _method(method: Method, by_seed: Mapping[int, Found | str], judges: Sequence[str]) -> MethodResult:
    found = tuple(each for each in by_seed.values() if isinstance(each, Found))
    left_out = {seed: said for seed, said in by_seed.items() if isinstance(said, str)}

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else None

    final, best = zip(*(each.rewards() for each in found), strict=True) if found else ((), ())
    spent = {k: mean([each.spent.get(each.updates, {}).get(k) for each in found]) for k in KINDS}
    return MethodResult(
        method,
        found,
        left_out,
        {judge: _judged(found, judge) for judge in judges} if found else {},
        mean(final),
        mean(best),
        mean([each.updates for each in found]),
        {kind: value for kind, value in spent.items() if value is not None},
        max((each.memory_gib for each in found if each.memory_gib is not None), default=None),
    )


def _judged(found: Sequence[Found], judge: str) -> Judged:
    after, changes = [each.after(judge) for each in found], [each.change(judge) for each in found]
    gains = np.array([np.nanmean(change) for change in changes])
    value = statistics.over_seeds(np.array([np.nanmean(each) for each in after]))
    return Judged(value, statistics.over_seeds(gains), _over_prompts(found, judge))


def _over_prompts(found: Sequence[Found], judge: str) -> Interval:
    """Of one run, what its own evaluation says; of several, the bootstrap over prompts."""
    first = found[0]
    group = first.evaluations[first.updates].group
    if len(found) == 1:
        return intervals.gain(first.after(judge), first.evaluations[min(first.evaluations)].scores[judge], group)
    if len({each.asked for each in found}) > 1:
        return Interval(float(np.mean([np.nanmean(each.change(judge)) for each in found])))
    return statistics.over_prompts(np.stack([each.change(judge) for each in found]), group)


def _pairs(methods: Sequence[MethodResult], judge: str) -> list[Pair]:
    """All pairs by a judge, with Holm's p-values."""
    pairs = [_pair(a, b, judge) for a, b in itertools.combinations([m for m in methods if m.found], 2)]
    adjusted = statistics.holm([pair.p for pair in pairs])
    return [replace(pair, p=p) for pair, p in zip(pairs, adjusted, strict=True)]


def _pair(a: MethodResult, b: MethodResult, judge: str) -> Pair:
    own, other = ({each.unit.seed: each for each in method.found} for method in (a, b))
    shared = [seed for seed in own if seed in other]
    nothing = Difference(Interval(float("nan")), 0)
    if not shared:
        return Pair(judge, a.label, b.label, nothing, float("nan"), reason="no seed came to its end in both")
    if len({each.asked for seed in shared for each in (own[seed], other[seed])}) > 1:
        return Pair(judge, a.label, b.label, nothing, float("nan"), reason="their evaluations are of different images")
    after = np.array([[np.nanmean(side[seed].after(judge)) for seed in shared] for side in (own, other)])
    found, prompts = statistics.difference(*after), None
    if len(shared) == 1:
        one, two = own[shared[0]], other[shared[0]]
        prompts = intervals.gain(one.after(judge), two.after(judge), one.evaluations[one.updates].group)
    return Pair(judge, a.label, b.label, found, found.p, prompts)


def _target(comparison: Comparison, methods: Sequence[MethodResult], judges: Sequence[str]) -> Target | None:
    """What was asked for, or the first method's mean at the end by the first judge."""
    if not judges:
        return None
    if comparison.asked.target is not None:
        judge, score = comparison.asked.target
        if judge not in judges:
            raise UserError(f"--target: got {judge!r}, allowed are {', '.join(judges)}")
    elif methods[0].found:
        judge, score = judges[0], methods[0].judges[judges[0]].value.value
    else:
        return None

    def cost(method: MethodResult, kind: str) -> Cost:
        curves: list[Any] = [each.curve(judge, kind) for each in method.found]
        return statistics.cost([statistics.reached(spent, scores, score) for spent, scores in curves])

    return Target(judge, score, {m.label: {kind: cost(m, kind) for kind in KINDS} for m in methods if m.found})
