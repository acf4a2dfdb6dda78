"""Tables of what there is: rules, rewards, embedded pipelines, presets."""

from __future__ import annotations

import inspect
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from diffalign import config as configs
from diffalign.comparing.tuning.spaces import declared
from diffalign.config.json_schema import summary
from diffalign.rewards import catalog
from diffalign.rules import RULES
from diffalign.shapes import models
from tools.docs.markdown import table

ROOT = Path(__file__).parents[2]


def rules() -> list[str]:
    """What each rule does and needs, with its settings as they are."""

    def row(name: str) -> tuple[str, ...]:
        needs, file = RULES[name]().needs, Path(inspect.getfile(RULES[name])).name
        reward = "none" if not needs.rewards else "with a gradient" if needs.differentiable_reward else "any"
        noise = "yes" if needs.stochastic_sampler else "no"
        groups = "2 or more" if needs.groups else "any"
        settings = f"[{len(RULES[name].Settings.model_fields)}](config.md#{name})"
        return f"`{name}`", summary(RULES[name]), reward, noise, groups, settings, f"`rules/{file}`"

    return table(
        ("rule", "what it does", "reward", "noisy sampler", "samples a prompt", "settings", "file"), map(row, RULES)
    )


def ranges() -> list[str]:
    """What `diffalign tune` tries of each key that declares it."""

    def said(found: dict[str, Any]) -> str:
        if "factors" in found:
            low, high = found["factors"]
            return f"{low:g} to {high:g} times the config's value, evenly in its logarithm"
        return "{} to {}, whole numbers".format(*found["counts"])

    sections = {name: field.annotation for name, field in configs.Config.model_fields.items()}
    every = {name: declared(of) for name, of in sections.items() if hasattr(of, "model_fields")}
    rows = [(f"`{name}.{key}`", "all", said(found)) for name, own in every.items() for key, found in own.items()]
    for name, rule in RULES.items():
        rows += [(f"`rule.{key}`", f"`{name}`", said(found)) for key, found in declared(rule.Settings).items()]
    return table(("key", "rule", "tried"), rows)


def rewards() -> list[str]:
    """The rewards that ship."""

    def row(entry: catalog.Entry) -> tuple[str, ...]:
        weights = f"`{entry.weights}`, {entry.licence}" if entry.weights else "none"
        size = f"{entry.memory:g} GiB" if entry.memory else "-"
        gradient = "yes" if entry.differentiable else "no"
        return f"`{entry.name}`", entry.about, entry.modality, gradient, entry.range or "-", weights, size

    head = ("reward", "what it scores", "sees", "gradient", "range", "weights", "size")
    return table(head, map(row, catalog.builtin().values()))


def embedded() -> list[str]:
    """The pipelines that ship with the package."""

    def row(name: str) -> tuple[str, ...]:
        folder = Path(str(models.path(name)))
        index = json.loads((folder / "model_index.json").read_text())
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        presets = sorted(f"`{name}`" for name, found in _presets().items() if found.model == folder.name)
        return f"`{name}`", index["_class_name"], f"{size / 1e6:.1f} MB", ", ".join(presets)

    return table(("pipeline", "class", "size", "presets"), map(row, models.names()))


@cache
def _presets() -> dict[str, configs.Config]:
    return {name: configs.load(str(path)) for name, path in configs.presets().items()}


def few_steps() -> list[str]:
    """Each embedded pipeline's network against its own walk, from benchmarks/few_steps.py."""
    found = json.loads((ROOT / "benchmarks" / "results" / "few_steps.json").read_text(encoding="utf-8"))["rows"]

    def row(name: str, at: dict[str, list[float]]) -> tuple[str, ...]:
        model, _, calls = name.partition(", ")
        levels, gaps, shares = (", ".join(f"{x:.2f}" for x in at[key]) for key in ("sigma", "D", "q"))
        return f"`{model}`", calls.removesuffix(" calls"), levels, gaps, shares

    return table(("pipeline", "calls", "sigma", "D", "q"), (row(name, at) for name, at in found.items()))


def evidence(header: str) -> str:
    """What of a preset was run, from its header."""
    if "Not run: it needs a GPU" in header:
        return "tiny weights, two updates"
    run = re.search(r"Run on (\d{4}-\d\d-\d\d)", header)
    return f"to its end, {run[1]}" if run else "not to its end"


def presets() -> list[str]:
    """Every preset: model, size, work an update, and what was run of it."""

    def row(name: str, found: configs.Config) -> tuple[str, ...]:
        call: dict[str, Any] = found.sampler.pipeline_args
        size = f"{call['height']} x {call['width']}" if "height" in call else "64 x 64"
        size = f"{size}, {call['num_frames']} frames" if "num_frames" in call else size
        guidance = call.get("true_cfg_scale", found.sampler.guidance_scale)
        samples = f"{found.prompts.groups} x {found.prompts.group_size}"
        ran = evidence((ROOT / "configs" / f"{name}.yaml").read_text().partition("\nmodel:")[0])
        model = found.model if models.path(found.model) is None else f"`{found.model}`"
        steps = str(found.sampler.steps)
        return f"`{name}`", model, size, steps, "-" if guidance is None else f"{guidance:g}", samples, ran

    head = ("preset", "model", "size", "steps", "guidance", "prompts x samples", "run")
    return table(head, (row(name, found) for name, found in _presets().items()))
