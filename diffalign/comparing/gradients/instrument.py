"""The instrument: bias, variance and cost of rules' gradients against full backpropagation, on one fixed batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign import config as configs
from diffalign.comparing.words import apart, changes, twice
from diffalign.comparing.words import labels as labels_of
from diffalign.config import Config
from diffalign.errors import UserError
from diffalign.evaluation.intervals import Interval
from diffalign.runtime.files import make_folder

if TYPE_CHECKING:
    from diffalign.comparing.gradients.laboratory import Measured

RESULTS = "gradients.json"


def specifications(words: Sequence[str]) -> dict[str, Config]:
    """Label -> config: each CONFIG[@KEY=VALUE]...'s rule with everything else as in the first, changed by the words KEY=VALUE.

    Raises:
        UserError: with every mistake, each after the CONFIG it is in.
    """
    names, overrides = apart(words)
    if not names:
        raise UserError("gradients: no CONFIG given, only overrides")
    first, settings = changes(names[0])
    base = configs.load(first, [*overrides, *(f"rule.{setting}" for setting in settings)])
    specs: dict[str, Config] = {}
    problems: list[str] = []
    for name in names:
        place, settings = changes(name)
        try:
            rule = configs.rule_of(place, settings)
            specs[name] = configs.validate({**base.model_dump(), "rule": rule}, book=base.book)
        except UserError as error:
            problems += [f"{name}: {problem}" for problem in error.problems]
            continue
        if not specs[name].make_rule().needs.rewards:
            problems.append(f"{name}: {specs[name].rule['name']} asks no reward, whose gradient all are held against")
        if not all(_differentiable(name) for name in base.rewards):
            problems.append(
                f"{name}: rewards: full backpropagation needs differentiable ones, got {', '.join(base.rewards)}"
            )
    if not problems:
        labels = _labels(list(specs.values()))
        problems = [f"{label}: given twice" for label in (*twice(labels), *twice(names))]
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return dict(zip(labels, specs.values(), strict=True))


def _differentiable(reward: str) -> bool:
    from diffalign.rewards import catalog

    return catalog.find(reward).differentiable


def _labels(configs: list[Config]) -> list[str]:
    """Each rule's name, and those settings that are not the default for every rule of that name."""
    names = [config.rule["name"] for config in configs]
    settings: list[Any] = [config.make_rule().settings for config in configs]
    changed: dict[str, set[str]] = {name: set() for name in names}
    for name, each in zip(names, settings, strict=True):
        changed[name] |= set(each.model_dump(exclude_defaults=True))
    return labels_of(names, [each.model_dump(mode="json") for each in settings], [changed[name] for name in names])


def run(specs: dict[str, Config], out: Path, batches: int, chain: bool, say: Callable[[str], None]) -> list[Measured]:
    """Measure each and write `gradients.json`, again after every one, and `gradients.png`.

    Raises:
        UserError: if the folder holds results already.
    """
    if (out / RESULTS).exists():
        raise UserError(f"--out: {out} holds results already; name another folder")
    import platform
    from datetime import date

    import torch

    from diffalign.comparing.gradients import report
    from diffalign.comparing.gradients.laboratory import Laboratory

    base = next(iter(specs.values()))
    make_folder(out, "--out")
    laboratory = Laboratory(base, batches, chain)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    facts = {
        "model": "Gaussian chain" if chain else base.model,
        "device": f"{device}, {torch.get_num_threads()} threads",
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "batches": batches,
        "config": base.model_dump(mode="json"),
    }
    measured: list[Measured] = []
    for label, config in specs.items():
        measured.append(laboratory.measure(label, config))
        report.save(out / RESULTS, measured, **facts)
        last = measured[-1]
        bias = report.resolved(last, Interval(last.bias, last.bias_low, last.bias_high))
        say(f"{label}: bias {bias}, {last.seconds:.3g} s a batch")
    noise = (True,) * (base.sampler.steps - 1) + (False,)
    parts = laboratory.contributions(noise, max(2, batches // 4))
    report.save(out / RESULTS, measured, contributions=parts, **facts)
    title = f"{facts['model']}, {base.sampler.steps} steps, {batches} batches of {base.samples_per_update}, {facts['device']}"
    report.figure(measured, parts, out / "gradients.png", title)
    return measured


def table(measured: list[Measured], out: Path) -> list[str]:
    """What was measured as lines, and where the figure is."""
    from diffalign.comparing.gradients import report

    return [*report.table(measured), str(out / "gradients.png")]
