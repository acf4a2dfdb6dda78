"""`diffalign init`: a config for a model, a rule, rewards and prompts, from the preset that is nearest, with a line on each choice."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffalign import config as configs
from diffalign.config import json_schema
from diffalign.config.places import placed
from diffalign.errors import UserError, shown
from diffalign.models import families
from diffalign.rules import RULES
from diffalign.runtime import yaml_text
from diffalign.runtime.files import is_folder, write_text
from diffalign.shapes import models

EMBEDDED = "shapes-sd3"
# What a section is about, beside it in the file.
WHY = {
    "model": "hub id, folder or embedded pipeline",
    "rule": "how it learns: `diffalign config FILE` lists its keys",
    "rewards": "what goes up, with weights; `diffalign rewards` lists them, FILE.py:NAME is one of yours",
    "eval_rewards": "what judges besides and is never trained on",
    "prompts": "groups x group_size samples an update; more samples a prompt: less noise",
    "sampler": "as the model is sampled; fewer steps are faster, also later",
    "lora": "a higher rank fits more, and more by heart",
    "optimizer": "lr: halve it if pictures break; micro_batch: as many as fit",
    "memory": "`diffalign plan FILE --vram 16` says whether it fits, and what would",
    "evaluation": "the same prompts and noises before and after",
    "output": "pictures in a grid",
    "precision": "of the frozen model",
    "updates": "the same command again goes on, with more of them too",
    "run_dir": "everything that the run leaves",
}


def write(
    place: Path,
    model: str = EMBEDDED,
    rule: str | None = None,
    rewards: Sequence[str] = (),
    prompts: str | None = None,
    vram: float | None = None,
) -> list[str]:
    """Write it, checked; returns what to tell.

    Raises:
        UserError: if the file is there, or what was asked for does not go together.
    """
    if place.exists():
        raise UserError(f"init: got {str(place)!r}, which is there; name a new file")
    if not is_folder(place.absolute().parent):
        raise UserError(f"init: got {str(place)!r}, there is no folder {str(place.parent)!r}; make it first")
    if rule is not None and rule not in RULES:
        raise UserError(f"--rule: got {shown(rule)}, allowed are {', '.join(sorted(RULES))}")
    name, raw = _nearest(model, rule)
    raw = {**raw, "model": model, "run_dir": f"runs/{place.stem}"}
    if rule is not None and raw["rule"]["name"] != rule:
        raw["rule"] = {"name": rule}
    raw, few = _in_few_steps(raw)
    if rewards:
        raw["rewards"] = dict.fromkeys(rewards, 1.0)
        raw["eval_rewards"] = [kept for kept in raw.get("eval_rewards", []) if kept not in rewards]
    if prompts is not None:
        kept = {key: value for key, value in raw.get("prompts", {}).items() if key not in ("tasks", "split", "stages")}
        raw["prompts"] = {**kept, "source": prompts}
    try:
        _check(raw)  # every mistake, before a file is there
    except UserError as error:
        if not all(problem.startswith("eval_rewards: ") for problem in error.problems):
            raise
        raw["eval_rewards"] = []  # the preset's, which these prompts do not suit
    json_schema.write_beside(place)
    write_text(place, _text(place, name, raw))
    told = [f"{place}: from {name}; {json_schema.BESIDE} beside it is for editors", *few, f"diffalign train {place}"]
    if vram is None:
        return told
    from diffalign.planning import vram as cards

    try:
        settings, fit = cards.fitted(str(place), (), vram)
    except UserError:
        place.unlink()
        raise
    chosen = {**fit.chosen, "memory.vram": vram, "memory.counted": settings.memory.counted}
    for key, value in chosen.items():
        configs.put(raw, key, value)
    write_text(place, _text(place, name, raw))
    return [*told[:-1], *cards.verdict(vram, fit), told[-1]]


def _check(raw: dict[str, Any]) -> None:
    tried = copy.deepcopy(raw)
    configs.validate(tried, placed(tried, None)[1])


NOISE = 0.9  # of cps with few steps: nearly each one is a draw


def _in_few_steps(raw: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Settings of a distilled model as it is used: its few steps and guidance, and what its rule needs so as not to blur it; what to tell
    of that. Others are left as they are."""
    usual = families.usual(raw["model"])
    if not usual.distilled:
        return raw, []
    rule, steps = dict(raw["rule"]), usual.steps
    guidance = {} if usual.guidance_scale is None else {"guidance_scale": usual.guidance_scale}
    sampler = {**raw.get("sampler", {}), "steps": steps, **guidance}
    changed = ""
    if rule["name"] == "awm" and steps > 2:
        # At its own states, where errors are next to nothing, its losers are pushed away without end: docs/few-step-models.md.
        pure = usual.process != "ddim"
        rule |= {"levels": [0, 2], "first_level": pure, "times": 1 + pure}
        changed = ", rule.levels: [0, 2]"
    elif "states" in RULES[rule["name"]].Settings.model_fields:
        rule |= {"states": "own"}
        changed = ", rule.states: own"
    elif RULES[rule["name"]]().needs.stochastic_sampler and usual.process != "ddim":
        sampler |= {"process": "cps", "noise_level": NOISE}
        changed = ", sampler.process: cps"
    if "window" in RULES[rule["name"]].Settings.model_fields:
        rule["window"] = [0, min(2, steps - 1)]
    said = f"{usual.distilled} says that this model is distilled: sampler.steps: {steps}{changed}"
    return {**raw, "rule": rule, "sampler": sampler}, [said]


# What a model that no preset is for begins with, by its process; of the sampler and precision it decides itself.
BEGINNINGS = {"flow_sde": "flow_grpo/sd35-medium", "ddim": "ddpo/sd15"}


def _nearest(model: str, rule: str | None) -> tuple[str, dict[str, Any]]:
    """The preset of the same kind of model, by the same rule if there is one: its name and settings.

    Raises:
        UserError: if nothing is known of the model.
    """
    kind, process = model, ""
    if not models.path(model):
        if problems := configs.check_model(model):
            raise UserError(*(f"--{problem}" for problem in problems))
        known = families.usual(model)
        process = known.process
        kind = families.table()[known.family]["model"] if known.family else ""
    found: list[tuple[bool, bool, str, dict[str, Any]]] = []  # another rule, a variant, its name, its settings
    for title, path in configs.presets().items():
        raw = yaml_text.parse(path.read_text(encoding="utf-8"), str(path))
        if kind and raw.get("model") == kind:
            usual = path.stem in families.table() or path.stem.startswith("shapes")
            found.append((raw["rule"]["name"] != (rule or "flow_grpo"), not usual, title, raw))
        elif not kind and title == BEGINNINGS[process]:
            found.append((False, False, title, {k: v for k, v in raw.items() if k not in ("sampler", "precision")}))
    _, _, title, raw = min(found, key=lambda each: each[:3])
    return title, raw


def _text(place: Path, name: str, raw: dict[str, Any]) -> str:
    """The file: a key a line, what is long in blocks, and why beside it."""
    head = json_schema.line(json_schema.BESIDE)
    head += f"# diffalign train {place}\n# From the preset {name}; `diffalign config {place}` shows every key with what it means.\n"
    lines = []
    for key in [key for key in WHY if key in raw] + [key for key in raw if key not in WHY]:
        why = f"  # {WHY[key]}" if key in WHY else ""
        lines.append(f"{key}: {yaml_text.flow(raw[key])}{why}\n")
    return head + "".join(lines)
