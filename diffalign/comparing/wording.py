"""What was found, in sentences and cells."""

from __future__ import annotations

import math

from diffalign.comparing import tuned
from diffalign.comparing.results import MethodResult, Pair, Results
from diffalign.comparing.statistics import Cost
from diffalign.evaluation.intervals import Interval

KINDS = {"rows": "network rows", "reward_calls": "reward calls", "seconds": "seconds"}


def finding(results: Results) -> str:
    """What the first judge says, in a sentence."""
    if not results.judges:
        return "The methods share no judge: nothing is compared."
    judge = results.judges[0]
    count = len([method for method in results.methods if method.found])
    if count < 2:
        return (
            f"{next(m for m in results.methods if m.found).label}: {_gain(results, judge)}; nothing to compare it with."
        )
    if (best := results.best(judge)) is not None:
        others = "the other" if count == 2 else f"all {count - 1} others"
        return f"{best} beats {others} on {judge}."
    told = [pair for pair in results.pairs if pair.judge == judge and pair.resolved]
    if told:
        return (
            f"On {judge}: "
            + ", ".join(f"{pair.better} beats {_worse(pair)}" for pair in told)
            + "; others are not resolved."
        )
    single = any(pair.prompts is not None for pair in results.pairs if pair.judge == judge)
    why = " of each: what another would give is not known" if single else ""
    return f"No difference between methods is resolved on {judge} with {seeds_said(results)}{why}."


def _gain(results: Results, judge: str) -> str:
    (method,) = [method for method in results.methods if method.found]
    return f"gain on {judge} {interval(method.judges[judge].gain, '+.3f')}"


def seeds_said(results: Results) -> str:
    """How many seeds methods have."""
    counts = sorted({len(method.found) for method in results.methods if method.found})
    return f"{counts[0]} to {counts[-1]} seeds" if len(counts) > 1 else seeds(counts[0])


def seeds(count: int) -> str:
    """A number of seeds."""
    return f"{count} seed{'s' if count != 1 else ''}"


def interval(found: Interval, form: str = ".3f") -> str:
    """A number and its interval over seeds, if there is one."""
    return found.text(form) if found.known else format(found.value, form)


def _worse(pair: Pair) -> str:
    return pair.second if pair.better == pair.first else pair.first


def sentence(pair: Pair) -> str:
    """What is said of two methods by a judge."""
    both = f"{pair.first} and {pair.second} on {pair.judge}"
    found, value = pair.difference, pair.difference.value
    if pair.reason:
        return f"{both}: not compared, {pair.reason}"
    if pair.prompts is not None:
        over = pair.prompts.text("+.3f")
        return (
            f"{both}: {over} in one run of each, the interval over prompts; what another seed would give is not known"
        )
    if math.isnan(pair.p):
        return f"{both}: {value.value:+.3f} in every one of {seeds(found.seeds)}"
    if pair.resolved:
        up = (
            value
            if value.value >= 0
            else Interval(-value.value, *(None if e is None else -e for e in (value.high, value.low)))
        )
        return f"{pair.better} beats {_worse(pair)} on {pair.judge} by {up.text()} (Holm {p_said(pair.p)}, {seeds(found.seeds)})"
    return (
        f"{both}: not resolved, {value.text('+.3f')} (Holm {p_said(pair.p)}); "
        f"differences under {found.half:.3f} could not be seen with {seeds(found.seeds)}, "
        f"and under {found.found:.3f} would be missed in more than one of five comparisons"
    )


def p_said(p: float) -> str:
    """A p-value."""
    return "p < 0.001" if p < 0.001 else f"p {p:.3f}" if p < 0.1 else f"p {p:.2f}"


def cost(found: Cost) -> str:
    """What a score cost."""
    if not found.reached:
        return f"never ({found.units} of {found.units} seeds do not reach it)"
    if found.most == 0:
        return "0, before training"
    text = "-" if found.median is None else number(found.median)
    if found.reached > 1 and found.least is not None and found.most is not None and found.least < found.most:
        text += f" [{number(found.least)} to {number(found.most)}]"
    if found.reached < found.units:
        text += f" ({found.reached} of {found.units} seeds reach it)"
    return text


def number(value: float) -> str:
    """A count or a time, to three digits or whole."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def spent(method: MethodResult, kind: str) -> str:
    """What units of a method took on average."""
    return number(method.spent[kind]) if kind in method.spent else "-"


def left_out(results: Results) -> list[str]:
    """Units that do not count, and why."""
    return [f"{m.label}, seed {seed}: {why}" for m in results.methods for seed, why in m.left_out.items()]


def lines(results: Results) -> list[str]:
    """What a terminal shows at the end."""
    found = [finding(results), ""]
    for method in results.methods:
        for judge, judged in method.judges.items():
            over = "" if len(method.found) > 1 else f", one seed; over its prompts {judged.gain_prompts.text('+.3f')}"
            found.append(
                f"{method.label}  {judge} {interval(judged.value)}  gain {interval(judged.gain, '+.3f')}{over}"
            )
    found += ["", *map(sentence, results.pairs)]
    if (target := results.target) is not None and len(results.methods) > 1:
        found += ["", f"to reach {target.score:.3f} on {target.judge}:"]
        for label, costs in target.costs.items():
            each = ", ".join(f"{KINDS[kind]} {cost(part)}" for kind, part in costs.items())
            found.append(f"  {label}: {each}")
    if told := tuned.said(results.comparison.methods):
        found += ["", *told]
    if missing := left_out(results):
        found += ["", *(f"left out: {line}" for line in missing)]
    return found
