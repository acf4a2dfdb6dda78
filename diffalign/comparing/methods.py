"""Methods, configs with changes, and units, methods with a seed: ordinary runs. Needs no torch."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign import config as configs
from diffalign.comparing.words import KINDS, apart, changes, labels, named, twice
from diffalign.config import Config
from diffalign.errors import UserError, one_line, shown
from diffalign.runtime import json_text
from diffalign.runtime.files import make_folder, write_text

CONFIG = "config.yaml"  # of a method, in its folder
OWN = ("seed", "run_dir")  # keys that units of one method differ in
BUDGET = ("updates", "budget", *(f"budget.{kind}" for kind in KINDS))  # keys that a budget decides
LONG = 60  # of a label that is made of settings
ENDLESS = 1_000_000  # updates of a run that another limit ends


@dataclass(frozen=True)
class Method:
    """settings: its resolved config, without what is each unit's own; folder: the name of its folder; tuned: what was tried before it had
    these settings, as `tuned.read` gives it, None if nothing is known of that."""

    label: str
    folder: str
    settings: dict[str, Any] = field(hash=False)
    tuned: dict[str, Any] | None = field(default=None, hash=False)


@dataclass(frozen=True)
class Unit:
    """A method trained with a seed; place: its run folder."""

    method: Method
    seed: int
    place: Path

    @property
    def name(self) -> str:
        """As it is said."""
        return f"{self.method.label}, seed {self.seed}"

    @property
    def finished(self) -> bool:
        """Whether its run came to its end: this file is the last of an adapter."""
        return (self.place / "adapter" / "curves.png").is_file()

    def command(self) -> list[str]:
        """What trains it, after `diffalign`; places are absolute."""
        place = self.place.absolute()
        return ["train", str(place.parent / CONFIG), f"seed={self.seed}", f"run_dir={place}"]

    def line(self) -> str:
        """The same for a shell."""
        return shlex.join(["diffalign", *self.command()])


@contextmanager
def reading(path: Path, number: int) -> Iterator[dict[str, Any]]:
    """The facts in a folder's file, and what to say where they cannot be read; number: the format that is read.

    Raises:
        UserError: if they are damaged, also where the context finds that out, or of another format.
    """
    try:
        facts = json_text.parse(path.read_bytes())
        if facts["format"] != number:
            raise UserError(f"--out: {path} has format {shown(facts['format'])}, this version reads {number}")
        yield facts
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--out: {path} is damaged ({one_line(error)}); choose another folder") from error


def within(budget: tuple[str, float]) -> list[str]:
    """What of a config a budget decides, a kind of `KINDS` and how much of it."""
    kind, limit = budget
    amount = f"{limit:.17g}"
    return [f"updates={amount}"] if kind == "updates" else [f"updates={ENDLESS}", f"budget.{kind}={amount}"]


def shared(settings: dict[str, Any]) -> dict[str, Any]:
    """What all units of a method share, of settings of whatever version."""
    return {key: value for key, value in configs.completed(settings).items() if key not in OWN}


def loaded(
    words: Sequence[str], overrides: Sequence[str], decided: Mapping[str, Sequence[str]]
) -> dict[str, tuple[Path, Config]]:
    """CONFIG[@KEY=VALUE]... [KEY=VALUE]... -> of each CONFIG[@KEY=VALUE] its file, and the config with some overrides.

    decided: option -> keys of a config that it decides.

    Raises:
        UserError: with every mistake; for keys that an option decides.
    """
    names, of_all = apart(words)
    found: dict[str, tuple[Path, Config]] = {}
    problems = [f"{name}: given twice" for name in twice(names)]
    for option, keys in decided.items():
        given = [key for key in named(words) if key in keys]
        problems += [f"{key}: {option} says it, for all" for key in given]
    for name in dict.fromkeys(names):
        place, settings = changes(name)
        try:
            found[name] = configs.find(place), configs.load(place, [*of_all, *settings, *overrides])
        except UserError as error:
            problems += [f"{name}: {problem}" for problem in error.problems]
    if problems:
        raise UserError(*problems)
    return found


def labelled(before: Sequence[Method], found: Sequence[Method]) -> tuple[Method, ...]:
    """Methods that were there, under the labels they had, and new ones, whose labels and folders are made here: the rule's name, and of
    what methods of that name differ in those settings that are not a default; where that is long, as it was asked for, the label that it
    comes with, if it is shorter.

    Raises:
        UserError: where one is given twice.
    """
    known = [method.settings for method in before]
    new = [method for method in found if method.settings not in known]
    if same := [
        a.label or a.settings["rule"]["name"] for k, a in enumerate(new) if a.settings in [b.settings for b in new[:k]]
    ]:
        raise UserError(*(f"{name}: given twice with the same settings" for name in same))
    every = [*known, *(method.settings for method in new)]
    names = [settings["rule"]["name"] for settings in every]
    shown = []
    for name, own in zip(names, every, strict=True):
        others = [other for other, named in zip(every, names, strict=True) if named == name]
        usual = configs.differences(configs.completed({"rule": {"name": name}}), own)  # what is not as it is by itself
        apart = {key for other in others for key in configs.differences(other, own)}
        shown.append({key for key in apart if configs.within(key, usual)})
    flat = [dict(configs.flat(settings)) for settings in every]
    methods = list(before)
    for label, made in zip(labels(names, flat, shown)[len(known) :], new, strict=True):
        if len(label) > LONG and 0 < len(made.label) < len(label):
            label = made.label
        label = _other(label, {method.label for method in methods})
        taken = {method.folder for method in methods}
        plain = re.sub(r"[^A-Za-z0-9._=-]+", "-", label)[:60].strip("-.")
        folder = _other(plain, taken, "-")
        methods.append(Method(label, folder, made.settings, made.tuned))
    return tuple(methods)


def _other(name: str, taken: Set[str], mark: str = " ") -> str:
    """A name, with a number after it if it is taken: what is found is kept by names."""
    return name if name not in taken else next(f for k in range(2, 10**6) if (f := f"{name}{mark}{k}") not in taken)


def write_config(folder: Path, config: Config) -> None:
    """Write a method's config into its folder, unless one is there."""
    path = folder / CONFIG
    if not path.is_file():
        make_folder(folder, "--out")
        write_text(path, configs.dump(config))
