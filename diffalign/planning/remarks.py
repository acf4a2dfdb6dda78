"""What a plan says of a config besides its costs, and of an update's terms."""

from __future__ import annotations

from dataclasses import replace

from diffalign.config import Config
from diffalign.models import families
from diffalign.models import few_steps as signs
from diffalign.rules import Rule
from diffalign.runtime.words import folded
from diffalign.types import Plan, Term


def weights(config: Config, rule: Rule) -> list[str]:
    """Of a weight that changes nothing."""
    weights = [weight for weight in config.rewards.values() if weight]
    scale = getattr(getattr(rule, "settings", None), "scale", "none")
    if rule.least or rule.needs.differentiable_reward or scale == "none" or len(weights) > 1 or abs(weights[0]) == 1:
        return []
    return [f"one reward: its weight {weights[0]:g} cancels in advantages of scale {scale}"]


def cache(config: Config) -> list[str]:
    """Of calls that a cache will cut short."""
    if config.sampler.cache is None:
        return []
    return ["sampler.cache: rows of sampling are counted whole; which blocks are spared is known as they are drawn"]


def few_steps(config: Config, rule: Rule) -> list[str]:
    """Of noise drawn anew on what was distilled, by its name or its files."""
    sign = families.distilled(config.model)
    if not sign or not rule.renoises(config.sampler.steps):
        return []
    return [f"{sign} says that this model is distilled: {signs.ADVICE}"]


def guidance(config: Config, rows: int, everywhere: int) -> list[str]:
    """Of guidance on some steps only; rows: of the network for an update, everywhere: those with guidance on all steps."""
    if config.sampler.guidance_steps is None:
        return []
    first, stop = config.sampler.guidance_steps
    saved = 100 * (1 - rows / everywhere)
    return [
        f"sampler.guidance_steps: guidance on {stop - first} of {config.sampler.steps} steps, {rows} rows forward instead of {everywhere}: "
        f"{saved:.3g} % fewer"
    ]


def anchored(rule: Rule, rows: int) -> list[str]:
    """Of what a run draws once, before its first update; rows: of the network for it."""
    if (data := rule.anchored_in) is None:
        return []
    return [
        f"rule.data: {data.count} samples of the base model, {rows} rows, are drawn in the first update beside its own, and again "
        "where a run goes on"
    ]


def evaluations(config: Config) -> str:
    """What evaluations cost."""
    evaluation, book_of = config.evaluation, config.book
    if not evaluation.enabled:
        return "evaluation is off"
    samples = len(book_of.evaluation) * evaluation.images_per_prompt
    every = f" and every {evaluation.every} updates" if evaluation.every else ""
    trained = ", on prompts that are trained on" if book_of.shared else ""
    return f"evaluation: {book_of.extent} x {evaluation.images_per_prompt} = {samples} samples, before, after{every}{trained}"


def steps(plan: Plan) -> list[str]:
    """The optimiser steps, a line each; those that are alike are one line, and so are terms that differ in their step alone."""
    said: list[tuple[str, list[int]]] = []
    for number, terms in enumerate(plan.updates, 1):
        alike: list[list[Term]] = []
        for term in terms:
            last = alike[-1][-1] if alike else None
            moved = last and replace(last, start=term.start, stop=term.stop) == term and term.start == last.stop
            if moved and last and last.stop - last.start == term.stop - term.start == 1 and term.steps is None:
                alike[-1].append(term)
            else:
                alike.append([term])
        text = ", ".join(
            str(run[0])
            if len(run) == 1
            else f"{run[0].through} of each of the steps {run[0].start} to {run[-1].start} x {run[0].weight:.3g}"
            for run in alike
        )
        if said and said[-1][0] == text:
            said[-1][1].append(number)
        else:
            said.append((text, [number]))
    return [
        f"step {folded(numbers):7}{text}" if len(numbers) == 1 else f"steps {folded(numbers)}: {text}"
        for text, numbers in said
    ]
