"""What `diffalign compare` found of the rules, from the results that are kept, for docs/choosing-a-rule.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scipy import stats

from diffalign.comparing.statistics import LEVEL, holm
from diffalign.evaluation.intervals import Interval
from tools.docs.markdown import table

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def _found(model: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"compare_{model}.json").read_text(encoding="utf-8"))


def methods(model: str, only: frozenset[str] = frozenset()) -> list[str]:
    """A row a rule, or one of those named alone: what it reached, and what a score cost it."""
    found = _found(model)
    judges, target = found["judges"], found["target"]

    def row(method: dict[str, Any]) -> tuple[str, ...]:
        gains = [Interval.of(method["judges"][judge]["gain"]).text("+.3f") for judge in judges]
        cost = target["costs"][method["label"]]["rows"]
        reached = f"{cost['median']:,.0f}" if cost["median"] is not None else "-"
        spread = f"{reached} ({cost['reached']} of {cost['units']})"
        return f"`{method['label']}`", *gains, f"{method['updates']:.0f}", spread

    head = (
        "rule",
        *(f"`{judge}`" for judge in judges),
        "updates",
        f"rows to {target['score']:.3f} on `{target['judge']}`",
    )
    return table(head, [row(method) for method in found["methods"] if not only or method["label"] in only])


def resolved(model: str) -> list[str]:
    """The pairs that are told apart, a line each."""
    pairs = [pair for pair in _found(model)["pairs"] if pair["resolved"]]
    return [f"- {pair['sentence']}" for pair in pairs] or ["- none"]


SECOND = "shapes_sd3_second"
# Asked for before the runs were made: what a newer form does to the rule that it is a form of. First and second, by label.
PLANNED = (
    ("awm implicit=group", "awm"),
    ("awm implicit=residual", "awm"),
    ("awm scouts", "awm"),
    ("awm PEPG times=3", "awm"),
    ("awm PEPG times=9", "awm"),
    ("truncated_bp connect=sparse", "truncated_bp"),
    ("truncated_bp connect=bridge", "truncated_bp"),
    ("flow_grpo inner=4", "flow_grpo"),
    ("grpo_guard inner=4", "grpo_guard"),
    ("flow_grpo trust=kl inner=4", "flow_grpo inner=4"),
)


def second() -> list[str]:
    """The newer forms, beside the rules that they are forms of."""
    return methods(SECOND, frozenset(label for pair in PLANNED for label in pair))


def planned() -> list[str]:
    """Their differences with 95 % intervals over seeds, and which are told apart, by Holm's correction over these pairs and all judges."""
    found = _found(SECOND)
    known = {(pair["judge"], frozenset((pair["first"], pair["second"]))): pair for pair in found["pairs"]}
    cells, chances = [], []
    for first, second in PLANNED:
        for judge in found["judges"]:
            pair = known[judge, frozenset((first, second))]
            sign, apart = (1.0 if pair["first"] == first else -1.0), pair["difference"]
            ends = sorted((sign * apart["low"], sign * apart["high"]))
            cells.append((first, second, judge, Interval(sign * apart["mean"], *ends)))
            freedom = pair["seeds"] - 1
            error = pair["half_width"] / float(stats.t.ppf(1 - LEVEL / 2, freedom))
            chances.append(2 * float(stats.t.sf(abs(apart["mean"]) / error, freedom)))
    marked = [
        (first, second, judge, cell.text("+.3f") + (" *" if chance < LEVEL else ""))
        for (first, second, judge, cell), chance in zip(cells, holm(chances), strict=True)
    ]
    rows = [
        (f"`{first}`", f"`{second}`", *(text for a, b, _, text in marked if (a, b) == (first, second)))
        for first, second in PLANNED
    ]
    return table(("form", "less", *(f"`{judge}`" for judge in found["judges"])), rows)


def fourfold() -> list[str]:
    """Matching rules over four times the updates: gold on the way, the trained reward, and how predictions grew; seed by seed."""
    found = json.loads((RESULTS / "fourfold.json").read_text(encoding="utf-8"))["runs"]
    places = (40, 80, 120, 160)

    def at(run: dict[str, Any], update: int, judge: str, form: str) -> str:
        rows = {row["update"]: row for row in run["evaluations"]}
        return format(rows[update][judge], form) if update in rows else "-"

    def told(run: dict[str, Any]) -> str:
        return f"{run['norm_ratio'][1]:.2f}, {run['norm_radial'][0]:+.2f}"

    rows = [
        (
            f"`{label}`" if "," not in label else label,
            *(", ".join(at(run, update, "shapes_geneval", ".2f") for run in runs.values()) for update in places),
            ", ".join(at(run, run["evaluations"][-1]["update"], "shapes_pref", "+.2f") for run in runs.values()),
            "; ".join(map(told, runs.values())),
            ", ".join("-" if run["alarm"] is None else str(run["alarm"]) for run in runs.values()),
        )
        for label, runs in found.items()
    ]
    head = (
        "rule",
        *(f"gold at {update}" for update in places),
        "`shapes_pref` at the end",
        "most `norm_ratio`, least `norm_radial`",
        "alarm at",
    )
    return table(head, rows)


def few_step_rules() -> list[str]:
    """Rules on the distilled pipeline: what each run came to, seed by seed."""
    found = json.loads((RESULTS / "few_step_rules.json").read_text(encoding="utf-8"))["runs"]

    def of(runs: dict[str, Any], number: Any) -> str:
        return ", ".join(number(run) for run in runs.values())

    def change(name: str) -> Any:
        return lambda run: f"{run['curve'][-1][name] - run['curve'][0][name]:+.3f}"

    rows = [
        (
            arm,
            *(of(runs, change(name)) for name in ("shapes_pref", "shapes_geneval", "shapes_judge")),
            of(runs, lambda run: f"{run['curve'][-1]['sharpness'] / run['curve'][0]['sharpness']:.2f}"),
            of(runs, lambda run: f"{run['walk']['D'][0]:.2f}"),
            *(
                of(runs, lambda run, calls=calls: f"{run['calls'][calls]['shapes_geneval']:.2f}")
                for calls in ("8", "20")
            ),
        )
        for arm, runs in found.items()
        if runs
    ]
    rewards = (f"`{name}`" for name in ("shapes_pref", "shapes_geneval", "shapes_judge"))
    return table(("rule", *rewards, "sharpness", "D", "gold at 8 calls", "at 20"), rows)
