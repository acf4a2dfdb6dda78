"""What an evaluation found, in sentences."""

from __future__ import annotations

from diffalign.evaluation.intervals import FEW, Interval


def against_base(name: str, reward: str, gain: Interval, verdicts: bool) -> str:
    """What is said of a model's paired gain over its base; verdicts: whether scores are 0 and 1, and so gains are points of a hundred."""
    scale, form, unit = (100, ".1f", " points") if verdicts else (1, ".3f", "")
    value = gain.value * scale
    if gain.low is None or gain.high is None:
        how = f"{value:+{form}}{unit} on {reward} against the base"
        return f"{name}: {how}; of fewer than {FEW} prompts, or alike ones, there is no interval."
    ends = (gain.low * scale, gain.high * scale)
    if ends[0] <= 0 <= ends[1]:
        between = f"95 % {ends[0]:+{form}} to {ends[1]:+{form}}"
        return f"{name} and the base are not told apart by {reward}: {value:+{form}}{unit}, {between}."
    up = value > 0
    low, high = ends if up else (-ends[1], -ends[0])
    amount, between = f"{abs(value):{form}}", f"95 % {low:{form}} to {high:{form}}"
    if verdicts:
        return f"{name} passes {reward} {amount} points {'more' if up else 'less'} often than the base, {between}."
    return f"{name} scores {amount} {'higher' if up else 'lower'} on {reward} than the base, {between}."


def alone(name: str, reward: str, mean: Interval, verdicts: bool) -> str:
    """What is said of a model that is held against nothing."""
    scale, form, unit = (100, ".1f", " %") if verdicts else (1, ".3f", "")
    verb = "passes" if verdicts else "scores"
    ends = "" if mean.ends is None else f", 95 % {mean.ends[0] * scale:{form}} to {mean.ends[1] * scale:{form}}"
    if verdicts:
        return f"{name} {verb} {reward} in {mean.value * scale:{form}}{unit}{ends}."
    return f"{name} {verb} {mean.value:{form}} on {reward}{ends}."
