"""Everything that can be checked without torch, all mistakes together."""

from __future__ import annotations

import copy
import itertools
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from diffalign.config import adapters, rewards
from diffalign.config.decided import Decided, decide, undecided
from diffalign.config.messages import A_RULE, near, renamed
from diffalign.config.messages import mistakes as told
from diffalign.config.sampling import unguided
from diffalign.config.schema import LARGEST, Config
from diffalign.config.selecting import unselectable
from diffalign.config.short import written_out
from diffalign.errors import UserError, shown
from diffalign.models.calls import FIXED, GIVEN
from diffalign.processes import PROCESSES
from diffalign.prompts.book import Book
from diffalign.prompts.sets import Entry
from diffalign.rewards import catalog
from diffalign.rules import RULES
from diffalign.runtime.extras import missing
from diffalign.runtime.files import HUB_ID, is_file
from diffalign.shapes import models


def validate(
    raw: dict[str, Any],
    problems: list[str] | None = None,
    book: Book | None = None,
    decided: Decided | None = None,
    ready: bool = True,
) -> Config:
    """A config from plain data; `problems` were found before, `book` holds its prompts if they were read, `decided` is what its model
    decided before; ready: the packages that it needs are to be there.

    Raises:
        UserError: with every mistake found.
    """
    mistakes, raw = list(problems or []), written_out(renamed(raw))
    now = _decide(raw, mistakes)
    before = decided or Decided()
    decided = Decided({**before.values, **now.values}, now.source or before.source)
    rule = raw.get("rule")
    count = len(mistakes)
    settings = _check_rule(rule, mistakes)
    whole = len(mistakes) == count
    try:
        config = Config(**raw)
    except ValidationError as error:
        own = [item for item in error.errors() if item["loc"][0] != "rule" or rule is None]
        mistakes += told(own, Config)
        # Look at the rest with the broken keys at their defaults, so that all mistakes come at once.
        try:
            config = _as_far(Config, raw, error)
        except ValidationError:
            raise UserError(*mistakes) from None
    if settings is not None:
        mistakes += _check_together(config, settings)
        if whole and hasattr(settings, "problems"):  # with keys left out, what it says about them is not so
            mistakes += settings.problems(config.sampler.steps)
    if not any(line.startswith(("rewards:", "rewards.")) for line in mistakes):  # they are left out then
        mistakes += rewards.asked(config, settings)
    mistakes += _check_names(config, book)
    mistakes += _check_packages(config) if ready else []
    if mistakes:
        raise UserError(*mistakes)
    config._decided = decided
    return config


def _decide(raw: dict[str, Any], problems: list[str]) -> Decided:
    """What the model decides, written into raw settings."""
    found = Decided()
    model = raw.get("model")
    if isinstance(model, str) and not check_model(model):
        try:
            found = decide(raw)
        except UserError as error:
            problems += error.problems
    undecided(raw)
    return found


def _check_rule(rule: Any, problems: list[str]) -> BaseModel | None:
    if not isinstance(rule, dict):
        if rule is not None:
            problems.append(f"rule: got {shown(rule)}, {A_RULE}")
        return None
    name = rule.get("name")
    if not isinstance(name, str) or name not in RULES:
        problems.append(f"rule.name: got {shown(name)}, allowed are {', '.join(RULES)}{near(str(name), RULES)}")
        return None
    settings = RULES[name].Settings
    given = {str(k): v for k, v in rule.items() if k != "name"}
    try:
        return settings(**given)
    except ValidationError as error:
        problems += told(error.errors(), settings, "rule.")
        return _as_far(settings, given, error)


def _as_far(kind: Any, given: dict[str, Any], error: ValidationError) -> Any:
    """What can be made of data without what is wrong in it; a part that then lacks what it needs goes as a whole."""
    inner = 0
    while True:
        places = [item["loc"] for item in error.errors()]
        given = _without(given, [place[: max(1, len(place) - inner)] for place in places])
        try:
            return kind(**given)
        except ValidationError as again:
            if inner > max(map(len, places)):
                raise
            error, inner = again, 1 + inner


def _without(raw: dict[str, Any], locations: list[tuple[Any, ...]]) -> dict[str, Any]:
    """A copy of nested data that lacks the values at some places."""
    copied = copy.deepcopy(raw)
    for location in locations:
        # One wrong entry spoils its whole list.
        names = list(itertools.takewhile(lambda part: isinstance(part, str), location))
        place: Any = copied
        for part in names[:-1]:
            place = place.get(part) if isinstance(place, dict) else None
        if isinstance(place, dict):
            place.pop(names[-1], None)
    return copied


def check_model(name: str) -> list[str]:
    """An embedded name, a folder that diffusers wrote, or something that can be a hub id."""
    if models.path(name) or is_file(Path(name) / "model_index.json") or HUB_ID.fullmatch(name):
        return []
    if is_file(Path(name)):
        return [
            f"model: got {shown(name)}, a single file; allowed is the hub id or folder of the model it was made from, and weights: {name}"
        ]
    known = ", ".join(models.names())
    allowed = f"allowed are embedded pipelines ({known}), folders with a model_index.json, hub ids (owner/name)"
    return [f"model: got {shown(name)}, {allowed}{near(name, models.names())}"]


def _check_names(config: Config, book: Book | None) -> list[str]:
    """What the config names is there; the prompts are read here, unless they were before."""
    problems = check_model(config.model)
    if config.revision is not None and (models.path(config.model) or Path(config.model).exists()):
        problems.append(
            f"revision: got {shown(config.revision)}, only models on the hub have one; {config.model} is a folder"
        )
    prompts: list[Entry] = []
    try:
        config._book = book or Book.read(config.prompts, config.evaluation, config.sampler.steps)
        prompts = config.book.entries
    except UserError as error:
        problems += error.problems
    if config.weights is not None and not is_file(Path(config.weights)):
        problems.append(f"weights: got {shown(config.weights)}, no file there; allowed is a .safetensors or .ckpt file")
    problems += adapters.start(config)
    problems += adapters.frozen(config)
    problems += adapters.teachers(config) if config._book is not None else []
    problems += rewards.there(config, prompts)
    if config.memory.encode_on == "cpu" and config.prompts.cache is None:
        problems.append("memory.encode_on: got cpu without prompts.cache, which it is for; set that to a folder")
    if config.memory.vram is not None and config.memory.counted is None:
        problems.append("memory.vram: it is written by --vram, which chooses the other settings; use that")
    if config.prompts.cache is not None and is_file(Path(config.prompts.cache).expanduser()):
        problems.append(f"prompts.cache: got {shown(config.prompts.cache)}, which is a file; allowed is a folder")
    if config.memory.shard != "none" and config.memory.quantize != "none":
        problems.append(
            f"memory.shard: got blocks with memory.quantize {config.memory.quantize}; allowed is one of the two"
        )
    if config.rewards and not any(config.rewards.values()):
        problems.append(f"rewards: got only zero weights {config.rewards}, allowed is at least one other")
    return problems


def _check_packages(config: Config) -> list[str]:
    """What is to be installed."""
    problems = []
    if config.attention == "xformers" and (mend := missing("xformers")):
        problems.append(f"attention: xformers is not installed; {mend}, or allowed is native")
    problems += [
        f"output.trackers: {name} is not installed; {mend}"
        for name in config.output.trackers
        if (mend := missing(name))
    ]
    for section, names in (("rewards", list(config.rewards)), ("eval_rewards", config.eval_rewards)):
        for name in names:
            with suppress(LookupError):  # said before
                problems += [f"{section}: {name} needs {lacks}"] if (lacks := catalog.find(name).missing) else []
    return problems


def _check_together(config: Config, settings: Any) -> list[str]:
    """Combinations that cannot work, each with the way out."""
    problems: list[str] = []
    sampler, name = config.sampler, config.rule["name"]
    rule = RULES[name](settings)
    needs = rule.needs
    stochastic = ", ".join(key for key, process in PROCESSES.items() if process.stochastic)
    if sampler.process not in PROCESSES:
        hint = near(sampler.process, PROCESSES)
        problems.append(f"sampler.process: got {shown(sampler.process)}, allowed are {', '.join(PROCESSES)}{hint}")
    elif needs.stochastic_sampler and not (PROCESSES[sampler.process].stochastic and sampler.noise_level > 0):
        given = f"{sampler.process} with noise_level {sampler.noise_level:g}"
        problems.append(
            f"sampler.process: {name} needs a stochastic sampler, {given} has no noise; "
            f"allowed are {stochastic} with noise_level > 0"
        )
    elif sampler.noise_level > (highest := PROCESSES[sampler.process].highest):
        problems.append(f"sampler.noise_level: got {sampler.noise_level:g}, {sampler.process} allows 0 to {highest:g}")
    if config.samples_per_update > LARGEST:
        problems.append(
            f"prompts.group_size: got {config.samples_per_update} samples per update, allowed are {LARGEST} at most"
        )
    elif config.samples_per_update % config.micro_batch:
        problems.append(
            f"optimizer.micro_batch: got {config.micro_batch}, allowed are divisors of "
            f"prompts.groups * prompts.group_size = {config.samples_per_update}, so that replay and rollout agree"
        )
    problems += rewards.unknown(config, settings)
    if config.prompts.group_size < 2 and needs.groups:
        problems.append("prompts.group_size: got 1, rewards are compared within a group; allowed is 2 or more")
    if config.prompts.groups % needs.bundle:
        problems.append(
            f"prompts.groups: got {config.prompts.groups}, allowed are multiples of rule.risk.bundle ({needs.bundle})"
        )
    if (config.budget.reward_calls or LARGEST) < (each := config.samples_per_update + config.scouts_per_update):
        problems.append(
            f"budget.reward_calls: got {config.budget.reward_calls}, an update scores {each}; allowed is that or more"
        )
    limits = [f"budget.{key}" for key, value in config.budget.model_dump().items() if value is not None]
    if limits and config.optimizer.schedule != "constant":
        problems.append(
            f"optimizer.schedule: got {config.optimizer.schedule}, which ends with updates, and {limits[0]} before; allowed is constant"
        )
    problems += [*_not_free(sampler.pipeline_args), *unselectable(config, rule)]
    problems += unguided(sampler, config.prompts.cache is not None)
    problems += _check_cache(config, needs.exact_steps) if sampler.cache is not None else []
    if needs.differentiable_reward:
        problems += rewards.differentiable(config, rule)
    return problems


def _not_free(arguments: dict[str, Any]) -> list[str]:
    """What another key gives, or what decides how noise becomes a picture."""
    problems = []
    for key in arguments:
        if key in GIVEN:
            problems.append(f"sampler.pipeline_args: got {key}; allowed with {GIVEN[key][0]}, which gives it")
        elif key in FIXED or not key.isidentifier():
            problems.append(
                f"sampler.pipeline_args: got {shown(key)}, it is not free; allowed are others of the pipeline's call"
            )
    return problems


def _check_cache(config: Config, exact: bool) -> list[str]:
    """What cannot go with features that are kept between steps; exact: the rule's samples need every step."""
    got, problems = f"sampler.cache: got {config.sampler.cache.name}", []  # type: ignore[union-attr]
    if exact:
        free = ", ".join(name for name, rule in RULES.items() if not rule().needs.exact_steps)
        problems.append(
            f"{got}, {config.rule['name']} learns from the steps a sample was made by, which must be the network's own; "
            f"allowed is null, or a rule that learns from finished samples alone: {free}"
        )
    if config.speed == "compile":
        problems.append(
            f"{got} with speed compile, compiled blocks are not left out; allowed are speed=auto, eager, graphs"
        )
    if config.memory.shard != "none":  # a process that left a block out would not take part in gathering it
        problems.append(
            f"{got} with memory.shard {config.memory.shard}, processes that hold blocks together run all of them; allowed is one of the two"
        )
    return problems
