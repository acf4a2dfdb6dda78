"""An evaluation's report as tables: CSV with a row for every number, and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

from diffalign.evaluation.found import at
from diffalign.evaluation.intervals import Interval
from diffalign.report.latex import escaped, plus_minus

# fmt: off
HEADS = ("model", "judge", "column", "part", "prompts", "mean", "low", "high", "gain", "gain_low", "gain_high", "unscored", "mark")
# fmt: on


def text(report: dict[str, Any]) -> str:
    """CSV: for every model and judge a row for all samples, for the mean of a column's means (part empty), and for every part; what is
    not known is empty."""
    written = io.StringIO()
    writer = csv.DictWriter(written, HEADS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_rows(report))
    return written.getvalue()


def _rows(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for model in report["models"]:
        for judge, score in model["scores"].items():
            same = {"model": model["label"], "judge": judge, "mark": score["mark"]}
            yield same | _numbers(score) | {"unscored": score["unscored"], "prompts": report["prompts"]["count"]}
            for column, found in score.get("by", {}).items():
                yield same | {"column": column} | _numbers(found)
                for name, prompts in report["columns"][column].items():
                    yield same | {"column": column, "part": name, "prompts": prompts} | _numbers(found["parts"][name])


def _numbers(found: dict[str, Any]) -> dict[str, Any]:
    """Of what was found, by the table's heads."""
    numbers: dict[str, Any] = {}
    for key, prefix in (("mean", ""), ("gain", "gain_")):
        facts = found.get(key, {})
        numbers |= {key: facts.get("mean"), f"{prefix}low": facts.get("low"), f"{prefix}high": facts.get("high")}
    return numbers


def latex(report: dict[str, Any]) -> str:
    """Booktabs tables: models by judges with the suite's number and its gain, then for every judge that and the first column's parts."""
    judges, models = report["rewards"], report["models"]
    prompts = f"{report['prompts']['count']} prompts x {report['samples_per_prompt']}"
    lines = [
        f"% diffalign {report['diffalign']}, {report['suite']}: {prompts}; half-widths are of 95 % intervals over prompts",
        f"% scores: {report['overall']}. {report['comparable']}".rstrip(),
        "% Needs \\usepackage{booktabs}.",
    ]
    heads = [rf"\multicolumn{{2}}{{c}}{{{escaped(judge)}}}" for judge in judges]
    body = [[cell for judge in judges for cell in _cells(model["scores"][judge], report["column"])] for model in models]
    parts = [" & ".join(["", *(("score & gain",) * len(judges))]) + r" \\"]
    lines += _tabular("rr" * len(judges), heads, parts, [model["label"] for model in models], body)
    for judge in judges:
        for column, parts in list(report["columns"].items())[:1]:
            names = list(parts)
            body = [
                [
                    _shown(at(score, report["column"]), "mean"),
                    *(_shown(at(score, column, name), "mean") for name in names),
                ]
                for score in (model["scores"][judge] for model in models)
            ]
            heads = ["overall", *map(escaped, names)]
            lines += ["", f"% {judge} by {column}"]
            lines += _tabular("r" * len(heads), heads, [], [model["label"] for model in models], body)
    return "\n".join([*lines, ""])


def _tabular(columns: str, heads: list[str], under: list[str], labels: list[str], body: list[list[str]]) -> list[str]:
    rows = [" & ".join([escaped(label), *cells]) + r" \\" for label, cells in zip(labels, body, strict=True)]
    top = " & ".join(["model", *heads]) + r" \\"
    return [
        rf"\begin{{tabular}}{{l{columns}}}",
        r"\toprule",
        top,
        *under,
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
    ]


def _cells(score: dict[str, Any], column: str | None) -> list[str]:
    found = at(score, column)
    return [_shown(found, "mean"), _shown(found, "gain", "+.3f")]


def _shown(found: dict[str, Any], key: str, form: str = ".3f") -> str:
    if key not in found:
        return "--"
    interval = Interval.of(found[key])
    return plus_minus(interval.value, interval.ends, form)
