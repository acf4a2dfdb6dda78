"""What is tuned: methods by label, a budget and a number of trials, kept as `tuning.json` in a folder. Needs no torch.

A trial is an ordinary run in `METHOD/trial_K/seed_S`, `METHOD/config.yaml` what it changes. The folder goes on: methods and trials join.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import diffalign
from diffalign import config as configs
from diffalign.comparing import alike
from diffalign.comparing.methods import (
    BUDGET,
    CONFIG,
    Method,
    Unit,
    labelled,
    loaded,
    reading,
    shared,
    within,
    write_config,
)
from diffalign.comparing.tuning.spaces import Range, checker, ranges
from diffalign.comparing.words import KINDS
from diffalign.config import Config
from diffalign.errors import UserError, shown
from diffalign.prompts.sets import has_splits
from diffalign.runtime.files import is_file, make_folder, write_text

FILE, FORMAT = "tuning.json", 1
VALIDATION, REWARD = "validation", "the training reward"
MOST = 10_000  # trials
DECIDED = {
    "--seed": ("seed",),
    "--out": ("run_dir",),
    "--budget": BUDGET,
    "--on": ("evaluation.split",),
    "tune": ("evaluation.every", "evaluation.enabled"),
}


@dataclass(frozen=True)
class Asked:
    """What all trials share. on: `validation`, or the absolute path of a file of prompts; judge: whose gain is to be high, None: the
    training reward's; seed: of training, and of what is tried."""

    budget: tuple[str, float]
    on: str = VALIDATION
    judge: str | None = None
    seed: int = 0
    allow: tuple[str, ...] = ()

    def overrides(self) -> list[str]:
        """What of a config it decides."""
        prompts = "evaluation.split=validation" if self.on == VALIDATION else f"evaluation.source={json.dumps(self.on)}"
        return [*within(self.budget), "evaluation.every=0", prompts]


@dataclass(frozen=True)
class Wish:
    """What a command asks for; None where it does not say."""

    budget: tuple[str, float] | None = None
    on: str | None = None
    judge: str | None = None
    seed: int | None = None
    allow: tuple[str, ...] = ()
    trials: int | None = None


@dataclass(frozen=True)
class Tuning:
    """A folder of trials. methods: with the settings of a trial that changes nothing; ranges: what is tried, by a method's folder."""

    place: Path
    asked: Asked
    trials: int
    methods: tuple[Method, ...] = ()
    ranges: dict[str, list[Range]] = field(default_factory=dict)

    def save(self) -> None:
        """Write `tuning.json`."""
        facts = {
            "format": FORMAT,
            "diffalign": diffalign.__version__,
            "asked": asdict(self.asked),
            "trials": self.trials,
            "methods": [
                {**asdict(method), "ranges": [asdict(each) for each in self.ranges[method.folder]]}
                for method in self.methods
            ],
        }
        write_text(self.place / FILE, json.dumps(facts, indent=1) + "\n")

    @classmethod
    def read(cls, place: Path) -> Tuning:
        """Read what `save` wrote.

        Raises:
            UserError: if it is damaged or another version's.
        """
        with reading(place / FILE, FORMAT) as facts:
            asked, methods = facts["asked"], facts["methods"]
            kind, limit = asked["budget"]
            return cls(
                place,
                Asked(**{**asked, "budget": (str(kind), float(limit)), "allow": tuple(asked["allow"])}),
                int(facts["trials"]),
                tuple(Method(each["label"], each["folder"], shared(each["settings"])) for each in methods),
                {each["folder"]: [_range(part) for part in each["ranges"]] for each in methods},
            )

    def config(self, method: Method, values: dict[str, float], trial: bool) -> Config:
        """A method's config with some values; trial: with what all trials share besides, else as the user gave it."""
        changes = [f"{key}={value!r}" for key, value in values.items()]
        own = [*self.asked.overrides(), "run_dir=of a trial"] if trial else []
        return configs.load(str(self.place / method.folder / CONFIG), [*own, *changes])

    def trial(self, method: Method, number: int, values: dict[str, float]) -> Unit:
        """A trial as a unit; its config is written.

        Raises:
            UserError: if the config may not have these values together.
        """
        folder = self.place / method.folder / f"trial_{number:03d}"
        config = self.config(method, values, trial=True)
        write_config(folder, config)
        settings = shared(config.model_dump(mode="json"))
        own = Method(f"{method.label}, trial {number}", method.folder, settings)
        return Unit(own, self.asked.seed, folder / f"seed_{self.asked.seed}")


def _range(part: dict[str, Any]) -> Range:
    return Range(**{**part, "factors": None if part["factors"] is None else tuple(part["factors"])})


def open_tuning(words: Sequence[str], wish: Wish, place: Path) -> Tuning:
    """The tuning in a folder, with what joins it; written down, and a config for each method.

    Raises:
        UserError: with every mistake; where what was asked before differs: with the difference.
    """
    there = Tuning.read(place) if is_file(place / FILE) else None
    asked = _agreed(there, wish, place)
    plain = loaded(words, (), DECIDED)  # what a user meant, and what a trial makes of it
    _check(plain, asked)
    found = loaded(words, [*asked.overrides(), "seed=0", "run_dir=of a trial"], {})
    made = [(Method("", "", shared(config.model_dump(mode="json"))), name) for name, (_, config) in found.items()]
    before = there or Tuning(place, asked, wish.trials or 0)
    methods = labelled(before.methods, [method for method, _ in made])
    whole = replace(before, asked=asked, trials=max(before.trials, wish.trials or 0), methods=methods)
    missing = {"tune: no CONFIG given": whole.methods, "--trials: none given, such as 20": whole.trials}
    if problems := [problem for problem, given in missing.items() if not given]:
        raise UserError(*problems)
    alike.check([(method.label, method.settings) for method in whole.methods], asked.allow)
    make_folder(place, "--out")
    if there is None and any(place.iterdir()):
        raise UserError(f"--out: {place} holds other files and no tuning; name another folder")
    spans = dict(before.ranges)
    for method in methods[len(before.methods) :]:
        name = next(name for own, name in made if own.settings == method.settings)
        write_config(place / method.folder, plain[name][1])
        fits = checker(str(place / method.folder / CONFIG), [*asked.overrides(), "run_dir=of a trial"])
        spans[method.folder] = ranges(found[name][1], fits)
    whole = replace(whole, ranges=spans)
    whole.save()
    return whole


def _agreed(there: Tuning | None, wish: Wish, place: Path) -> Asked:
    """What is asked, held against what was asked before."""
    on = None if wish.on in (None, VALIDATION) else str(Path(wish.on or "").absolute())
    if on is not None and not is_file(Path(on)):
        raise UserError(f"--on: got {shown(wish.on)}, allowed are validation and a file of prompts")
    on = on or wish.on
    if there is None:
        if wish.budget is None:
            kinds = ", ".join(f"{kind}=N" for kind in KINDS)
            raise UserError(f"--budget: none given, and {place} holds no tuning; allowed is one of {kinds}")
        return Asked(wish.budget, on or VALIDATION, wish.judge, wish.seed or 0, wish.allow)
    old = there.asked
    pairs = (
        ("--budget", old.budget, wish.budget),
        ("--on", old.on, on),
        ("--judge", old.judge, wish.judge),
        ("--seed", old.seed, wish.seed),
    )
    if differ := [f"  {name}: {was} -> {now}" for name, was, now in pairs if now not in (None, was)]:
        raise UserError(f"--out: {place} holds a tuning with other settings; name another folder", *differ)
    return replace(old, allow=tuple(dict.fromkeys([*old.allow, *wish.allow])))


def _check(plain: dict[str, tuple[Path, Config]], asked: Asked) -> None:
    """Refuse prompts that would be judged by again, and a judge that is none."""
    problems = []
    for name, (_, config) in plain.items():
        evaluation = config.evaluation
        source = evaluation.source or config.prompts.source
        if asked.on == VALIDATION and not has_splits(source):
            problems.append(
                f"--on: got validation, and {name} is judged on {source}, which has no such part; allowed is a file of prompts to tune on"
            )
        elif asked.on == VALIDATION == evaluation.split:
            problems.append(
                f"{name}: evaluation.split: got validation, which settings would be chosen on and judged on; allowed is test"
            )
        judges = [*config.rewards, *config.eval_rewards]
        if asked.judge is None and not config.rewards:
            problems.append(f"--judge: got none, {name} has no rewards of its own; allowed are {', '.join(judges)}")
        if asked.judge is not None and asked.judge not in judges:
            problems.append(f"--judge: got {shown(asked.judge)}, allowed for {name} are {', '.join(judges)}")
    if problems:
        raise UserError(*problems)
