"""What was found as files: `results.json`, `results.csv` with a row a unit, `table.tex`."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffalign
from diffalign.comparing import tuned, wording
from diffalign.comparing.results import KINDS, MethodResult, Results
from diffalign.comparing.units import Found
from diffalign.report.latex import escaped, plus_minus
from diffalign.runtime.files import write_text


def write(results: Results, place: Path) -> None:
    """Write all three."""
    write_text(place / "results.json", json.dumps(_plain(facts(results)), indent=1, allow_nan=False) + "\n")
    write_text(place / "results.csv", table(results))
    write_text(place / "table.tex", latex(results))


def facts(results: Results) -> dict[str, Any]:
    """Everything, as plain data; numbers that are not known are null."""
    comparison, target = results.comparison, results.target
    return {
        "diffalign": diffalign.__version__,
        "finding": wording.finding(results),
        "budget": dict([comparison.asked.budget]),
        "every": comparison.asked.every,
        "judges": list(results.judges),
        "methods": [_method(method, results.judges) for method in results.methods],
        "pairs": [
            {
                **{k: v for k, v in asdict(pair).items() if k not in ("difference", "prompts")},
                "difference": pair.difference.value.facts(),
                "seeds": pair.difference.seeds,
                "half_width": pair.difference.half,
                "found_at_80_percent": pair.difference.found,
                "over_prompts": None if pair.prompts is None else pair.prompts.facts(),
                "resolved": pair.resolved,
                "sentence": wording.sentence(pair),
            }
            for pair in results.pairs
        ],
        "target": None if target is None else asdict(target),
        "tuning": {
            "alike": tuned.alike(comparison.methods),
            "said": tuned.said(comparison.methods),
            "methods": {method.label: method.tuned for method in comparison.methods},
        },
        "runs": list(comparison.runs),
    }


def _method(method: MethodResult, judges: tuple[str, ...]) -> dict[str, Any]:
    return {
        "label": method.label,
        "settings": method.method.settings,
        "seeds": method.seeds,
        "left_out": {str(seed): why for seed, why in method.left_out.items()},
        "judges": {
            name: {
                "value": judged.value.facts(),
                "gain": judged.gain.facts(),
                "gain_over_prompts": judged.gain_prompts.facts(),
                "by_seed": {str(each.unit.seed): _seen(each, name) for each in method.found},
            }
            for name, judged in method.judges.items()
        },
        "training_reward": {"final": method.reward_final, "best": method.reward_best},
        "updates": method.updates,
        **{kind: method.spent.get(kind) for kind in KINDS},
        "memory_gib": method.memory_gib,
    }


def _plain(value: Any) -> Any:
    """The same without what JSON has no word for."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(results: Results) -> str:
    """A row a unit, as CSV; empty where nothing is known."""
    judged = [f"{judge}_{part}" for judge in results.judges for part in ("before", "after", "gain")]
    heads = ["method", "seed", "state", "updates", *KINDS, "memory_gib", "reward_final", "reward_best", *judged]
    text = io.StringIO()
    writer = csv.DictWriter(text, heads, lineterminator="\n")
    writer.writeheader()
    for method in results.methods:
        for each in method.found:
            writer.writerow(_row(each, method.label, results.judges))
        for seed, why in method.left_out.items():
            writer.writerow({"method": method.label, "seed": seed, "state": why})
    return text.getvalue()


def _row(each: Found, label: str, judges: tuple[str, ...]) -> dict[str, Any]:
    final, best = each.rewards()
    row = {"method": label, "seed": each.unit.seed, "state": "done", "updates": each.updates}
    row |= each.spent.get(each.updates, {}) | {
        "memory_gib": each.memory_gib,
        "reward_final": final,
        "reward_best": best,
    }
    for judge in judges:
        row |= {f"{judge}_{part}": value for part, value in _seen(each, judge).items()}
    return row


def _seen(each: Found, judge: str) -> dict[str, float]:
    """What a judge says of a unit."""
    scores = each.curve(judge, "updates")[1]
    before, after = float(scores[0]), float(scores[-1])
    return {"before": before, "after": after, "gain": after - before}


def latex(results: Results) -> str:
    """The methods as a booktabs table: values and gains with half-widths of 95 % intervals over seeds. Bold is what is told apart from
    every other method, by Holm's p-values, and above them."""
    columns = "".join("rr" for _ in results.judges)
    heads = " & ".join(rf"\multicolumn{{2}}{{c}}{{{escaped(judge)}}}" for judge in results.judges)
    parts = " & ".join("score & gain" for _ in results.judges)
    budget = "{}={:.10g}".format(*results.comparison.asked.budget)
    lines = [
        f"% diffalign {diffalign.__version__}: {wording.seeds_said(results)}, {budget}; half-widths are of 95 % intervals over seeds;",
        "% bold: told apart from every other method (Holm) and above them. Needs \\usepackage{booktabs}.",
        rf"\begin{{tabular}}{{lr{columns}r}}",
        r"\toprule",
        rf"method & seeds & {heads} & network rows \\",
        rf" & & {parts} & \\",
        r"\midrule",
    ]
    for method in results.methods:
        cells = [escaped(method.label), str(len(method.found))]
        for judge in results.judges:
            if judge not in method.judges:
                cells += ["--", "--"]
                continue
            judged = method.judges[judge]
            value = plus_minus(judged.value.value, judged.value.ends, ".3f")
            gain = plus_minus(judged.gain.value, judged.gain.ends, "+.3f")
            cells += [rf"\textbf{{{value}}}" if results.best(judge) == method.label else value, gain]
        cells.append(wording.spent(method, "rows").replace(",", "{,}") if method.found else "--")
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])
