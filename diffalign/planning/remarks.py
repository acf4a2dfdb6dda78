"""What a plan says of a config besides its costs."""

from __future__ import annotations

from diffalign.config import Config
from diffalign.rules import Rule


def weights(config: Config, rule: Rule) -> list[str]:
    """Of a weight that changes nothing."""
    weights = [weight for weight in config.rewards.values() if weight]
    scale = getattr(getattr(rule, "settings", None), "scale", "none")
    if rule.least or scale == "none" or len(weights) > 1 or abs(weights[0]) == 1:
        return []
    return [f"one reward: its weight {weights[0]:g} cancels in advantages of scale {scale}"]


def cache(config: Config) -> list[str]:
    """Of calls that a cache will cut short."""
    if config.sampler.cache is None:
        return []
    return ["sampler.cache: rows of sampling are counted whole; which blocks are spared is known as they are drawn"]


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


def evaluations(config: Config) -> str:
    """What evaluations cost."""
    evaluation, book_of = config.evaluation, config.book
    if not evaluation.enabled:
        return "evaluation is off"
    samples = len(book_of.evaluation) * evaluation.images_per_prompt
    every = f" and every {evaluation.every} updates" if evaluation.every else ""
    trained = ", on prompts that are trained on" if book_of.shared else ""
    return f"evaluation: {book_of.extent} x {evaluation.images_per_prompt} = {samples} samples, before, after{every}{trained}"
