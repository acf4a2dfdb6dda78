"""Rewards that a config names: as many as its rule wants, there, and fit for its prompts and its rule."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from diffalign.config.schema import Config
from diffalign.errors import shown
from diffalign.prompts.sets import Entry
from diffalign.rewards import catalog
from diffalign.rules import RULES, Rule


def asked(config: Config, settings: Any) -> list[str]:
    """Rewards where the rule wants some, and none where it does not; settings: the rule's, None: it is not known."""
    if settings is None or RULES[config.rule["name"]](settings).needs.rewards:
        if config.rewards:
            return []
        given = "rewards" in config.model_fields_set
        return ["rewards: got {}, allowed is at least 1 entry" if given else "rewards: missing"]
    name, problems = config.rule["name"], []
    if config.rewards:
        problems.append(
            f"rewards: got {', '.join(config.rewards)}, {name} asks none in training; allowed is to leave it out, and eval_rewards to judge"
        )
    if config.budget.reward_calls is not None:
        problems.append(
            f"budget.reward_calls: got {config.budget.reward_calls}, {name} asks no rewards; allowed is null"
        )
    if config.evaluation.enabled and not config.eval_rewards:
        problems.append(
            "eval_rewards: got none, and no rewards are there to judge with; allowed is one, or evaluation.enabled=false"
        )
    return problems


def there(config: Config, prompts: list[Entry]) -> list[str]:
    """Rewards that are there, with what they import, for prompts that have what they need."""
    problems: list[str] = []
    for section, names in (("rewards", list(config.rewards)), ("eval_rewards", config.eval_rewards)):
        for name in names:
            others, unfit = catalog.problems(name, prompts, config.sampler.fps)
            suits = "shapes-motion" if "motion" in unfit else "shapes"
            problems += [f"{section}: {name}{problem}" for problem in others]
            problems += [f"{section}: {name}{unfit}; prompts.source: {suits} suits it"] if unfit else []
    return problems


def unknown(config: Config, settings: Any) -> list[str]:
    """Rewards that are named in a rule's settings or for a contrast and the run does not have."""
    named = [(f"rule.{key}", name) for key in ("gate", "floors") for name in getattr(settings, key, ())]
    named += [("scoring.contrast", name) for name in config.scoring.contrast]
    allowed = f"allowed are rewards of this run: {', '.join(config.rewards)}"
    same = [name for name, words in config.scoring.contrast.items() if words.plus == words.minus]
    return [
        *(f"{key}: got {shown(name)}, {allowed}" for key, name in named if name not in config.rewards),
        *(f"scoring.contrast.{name}.minus: got the words of plus, which leaves 0; allowed are others" for name in same),
        *_beside(config, settings),
    ]


def _beside(config: Config, settings: Any) -> list[str]:
    """Rewards that are asked in training and not trained on, of several samples of a prompt: what a gated divergence is held against, and
    what gains are multiplied by."""
    silent = [name for name, weight in config.rewards.items() if weight == 0]
    allowed = f"this run's rewards of weight 0: {', '.join(silent) or 'there are none yet'}"
    gate, factor = getattr(settings, "kl_gate", None), getattr(settings, "diversity", None)
    named = [
        *(("kl_gate.by", name) for name in (gate.by if gate else ())),
        *([("diversity", factor)] if factor else []),
    ]
    problems = [f"rule.{key}: got {shown(name)}, allowed are {allowed}" for key, name in named if name not in silent]
    if named and config.prompts.group_size < 2:
        key = named[0][0].partition(".")[0]
        problems.append(f"prompts.group_size: got 1, rule.{key} compares samples of a group; allowed is 2 or more")
    return problems


def differentiable(config: Config, rule: Rule) -> list[str]:
    """Rewards without a gradient, where the rule needs one."""
    able = ", ".join(name for name, entry in catalog.builtin().items() if entry.differentiable) or "none that ship"
    problems = []
    by = f"{rule.name} with rule.last_step" if getattr(rule.settings, "last_step", None) else rule.name
    for name in (name for name, weight in config.rewards.items() if weight or name in rule.least):
        with suppress(LookupError):  # `there` reports it
            if not catalog.find(name).differentiable:
                problems.append(
                    f"rewards: {by} needs a differentiable reward, {name} is not; differentiable here: {able}; "
                    "a file of yours says DIFFERENTIABLE = [NAME]"
                )
    return problems
