"""Whether a run's model was distilled to few steps: by what its name and files say, and by its network against its own walk."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from diffalign.models import families, few_steps
from diffalign.rules import GAP, OwnWalk, own_walk
from diffalign.runtime.memory import fitting

if TYPE_CHECKING:
    from diffalign.config import Config
    from diffalign.protocols import TrainablePolicy

WALKED = 16  # samples that a network is held against its own walk on


def introduce(config: Config, policy: TrainablePolicy, say: Callable[[str], None]) -> None:
    """Say it where a rule draws noise anew and there are few steps, or a name or file says that the model is distilled."""
    sign, steps = families.distilled(config.model), policy.schedule.steps
    if config.make_rule().renoises(steps) and (steps <= few_steps.STEPS or sign):
        say(verdict(sign, measured(config, policy, say), steps))


def examined(config: Config, say: Callable[[str], None]) -> str:
    """The same of any config's model, which is loaded for it, whatever its steps; what to set, where the rule draws noise anew."""
    from diffalign.runs import parts

    policy = parts.bare(config)
    sign, steps = families.distilled(config.model), policy.schedule.steps
    return verdict(sign, measured(config, policy, say), steps, config.make_rule().renoises(steps))


def measured(config: Config, policy: TrainablePolicy, say: Callable[[str], None]) -> OwnWalk | None:
    """D and q on samples of the first prompts, by as many at a time as an update has."""
    batch = config.book.draw(WALKED, 1, config.seed, 0)
    return fitting(policy, lambda: own_walk(policy, batch), say)


def verdict(sign: str, found: OwnWalk | None, steps: int, minds: bool = True) -> str:
    """The line: from what name or files say, empty if nothing, and what was measured, None where that is not possible; minds: whether
    the rule draws noise anew, which a distilled model does not bear."""
    advice = f": {few_steps.ADVICE}" if minds else ", which this config's rule does not mind"
    if found is not None and found.distilled:
        return f"this model is distilled ({found}; {sign or 'neither its name nor its files say so'}){advice}"
    if sign:
        few = f"{steps} steps are too few to measure it"
        measured = few if found is None else f"{found} that it is not (D below {GAP} is); if it is"
        return f"{sign} says that this model is distilled, {measured}{advice}"
    if found is None:
        return f"{steps} steps are too few to measure whether this model is distilled; if it is{advice}"
    suits = ", so noise drawn anew suits it" if minds else ""
    return f"{steps} steps, {found}: this model is not distilled (D below {GAP} is){suits}"
