"""The keys of a config that say which samples an update draws of its prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from diffalign.errors import shown
from diffalign.rules import RULES, Rule
from diffalign.runtime.settings import Settings

if TYPE_CHECKING:
    from diffalign.config.schema import Config


class ScoutsConfig(Settings):
    """Keys of `prompts.scouts:`."""

    pool: int = Field(
        96, ge=1, le=100_000, description="seeds a prompt that are tried; a multiple of prompts.group_size"
    )
    steps: int = Field(5, ge=1, le=1000, description="of a scout; as many as sampler.steps: the sampler's own")
    rewards: list[str] | None = Field(None, min_length=1, description="those that score scouts; null: all of the run")


class AllocateConfig(Settings):
    """Keys of `prompts.allocate:`."""

    least: int = Field(4, ge=2, le=100_000, description="samples of a prompt; a multiple of the micro-batch")
    most: int = Field(32, ge=2, le=100_000, description="samples of a prompt; a multiple of the micro-batch")
    decay: float = Field(
        0.9, ge=0, lt=1, description="of a prompt's pass rate, each time it is drawn; 0: the last alone"
    )


def unselectable(config: Config, rule: Rule) -> list[str]:
    """What cannot go with scouts or with groups of unequal size, each with the way out."""
    return [*_unscouted(config, rule), *_unallocated(config, rule)]


def _unallocated(config: Config, rule: Rule) -> list[str]:
    allocate, prompts, micro = config.prompts.allocate, config.prompts, config.micro_batch
    if allocate is None:
        return []
    problems, needs, beside = [], rule.needs, getattr(rule.settings, "last_step", None) is not None
    if not needs.groups or needs.bundle > 1 or (needs.differentiable_reward and not beside):
        able = [name for name, rule in RULES.items() if rule().needs.groups and not rule().needs.differentiable_reward]
        problems.append(
            f"prompts.allocate: got {config.rule['name']}, which does not compare samples within one prompt; "
            f"allowed is null, or one that does, without fan and risk: {', '.join(able)}"
        )
    if not allocate.least <= prompts.group_size <= allocate.most:
        problems.append(
            f"prompts.allocate: got least {allocate.least} and most {allocate.most}, allowed are "
            f"least <= prompts.group_size ({prompts.group_size}) <= most"
        )
    if config.divided % micro and not config.samples_per_update % micro:  # else it is said of all samples
        problems.append(
            f"optimizer.micro_batch: got {micro} with prompts.allocate, which has no micro-batch of two prompts; allowed are "
            f"divisors of prompts.group_size, least and most ({config.divided})"
        )
    given = {
        "prompts.scouts": prompts.scouts is not None,
        "rule.window_by: prompt": needs.apart,
        "rule.last_step": beside,
    }
    return [
        *problems,
        *(f"prompts.allocate: got it with {key}; allowed is one of the two" for key, on in given.items() if on),
    ]


def _unscouted(config: Config, rule: Rule) -> list[str]:
    scouts = config.prompts.scouts
    if scouts is None:
        return []
    problems, size, steps = [], config.prompts.group_size, config.sampler.steps
    needs = rule.needs
    if not needs.rewards:
        return [f"prompts.scouts: got {config.rule['name']}, which asks no rewards to choose by; allowed is null"]
    if needs.stochastic_sampler:
        able = ", ".join(
            name for name, rule in RULES.items() if not rule().needs.stochastic_sampler and rule().needs.rewards
        )
        noisy = config.rule["name"] + (" with rule.noise" if config.rule["name"] in able.split(", ") else "")
        problems.append(
            f"prompts.scouts: got {noisy}, whose samples are not what their seeds make of them alone; "
            f"allowed is null, or a rule that samples without noise: {able}"
        )
    if scouts.pool % size:
        problems.append(f"prompts.scouts.pool: got {scouts.pool}, allowed are multiples of prompts.group_size ({size})")
    if scouts.steps > steps:
        problems.append(f"prompts.scouts.steps: got {scouts.steps}, allowed is up to sampler.steps ({steps})")
    return problems + _unknown(scouts.rewards, config.rewards)


def _unknown(named: list[str] | None, rewards: Mapping[str, float]) -> list[str]:
    """Rewards of scouts that the run does not have, or that weigh nothing."""
    here = "prompts.scouts.rewards"
    unknown = [name for name in named or () if name not in rewards]
    if unknown or named is None:
        return [f"{here}: got {shown(name)}, allowed are rewards of this run: {', '.join(rewards)}" for name in unknown]
    if not any(rewards[name] for name in named):
        return [f"{here}: got {', '.join(named)}, which weigh 0; allowed with one whose weight is another"]
    return []
