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
    from diffalign.types import Prompts

WALKED = 16  # samples that a network is held against its own walk on, at most


def introduce(config: Config, policy: TrainablePolicy, batch: Prompts, say: Callable[[str], None]) -> None:
    """Say it where a rule draws noise anew and there are few steps, or a name or file says that the model is distilled."""
    sign, steps = families.distilled(config.model), policy.schedule.steps
    if config.make_rule().renoises(steps) and (steps <= few_steps.STEPS or sign):
        say(verdict(sign, measured(policy, batch, say), steps))


def examined(config: Config, say: Callable[[str], None]) -> str:
    """The same of any config's model, which is loaded for it, whatever its rule and steps."""
    from diffalign.runs import parts

    policy, prompts = parts.bare(config), config.prompts
    batch = config.book.draw(prompts.groups, prompts.group_size, config.seed, 0)
    return verdict(families.distilled(config.model), measured(policy, batch, say), policy.schedule.steps)


def measured(policy: TrainablePolicy, batch: Prompts, say: Callable[[str], None]) -> OwnWalk | None:
    """D and q on some of a batch, as many as fit."""
    return fitting(
        policy, lambda: own_walk(policy, batch.select(range(min(WALKED, len(batch), policy.micro_batch)))), say
    )


def verdict(sign: str, found: OwnWalk | None, steps: int) -> str:
    """The line: from what name or files say, empty if nothing, and what was measured, None where that is not possible."""
    if found is None:
        few = f"{steps} steps are too few to measure"
        first = (
            f"{sign} says that this model is distilled, {few} it"
            if sign
            else f"{few} whether this model is distilled; if it is"
        )
        return f"{first}: {few_steps.ADVICE}"
    if found.distilled:
        return (
            f"this model is distilled ({found}; {sign or 'neither its name nor its files say so'}): {few_steps.ADVICE}"
        )
    if sign:
        return (
            f"{sign} says that this model is distilled, {found} that it is not (D below {GAP} is); if it is: "
            f"{few_steps.ADVICE}"
        )
    return f"{steps} steps, {found}: this model is not distilled (D below {GAP} is), so noise drawn anew suits it"
