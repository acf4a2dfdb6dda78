"""What is compared: methods by label, seeds and a budget, kept as `comparison.json` in a folder. Needs no torch.

A method is a config with changes; a unit is a method with a seed, an ordinary run in `units/FOLDER/seed_K`. The folder goes on: methods and
seeds join, what all methods share stays.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import filelock

import diffalign
from diffalign import config as configs
from diffalign.comparing import alike
from diffalign.comparing.words import KINDS, apart, changes, labels, named, twice
from diffalign.config import Config
from diffalign.errors import UserError, one_line, shown
from diffalign.runs.folder import LOCK
from diffalign.runtime import json_text
from diffalign.runtime.files import make_folder, write_text

FILE, UNITS, FORMAT = "comparison.json", "units", 1
ENDLESS = 1_000_000  # updates of a run that another limit ends
OWN = ("seed", "run_dir")  # keys that units of one method differ in
# option -> keys of a config that it decides
DECIDED = {
    "--seeds": ("seed",),
    "--out": ("run_dir",),
    "--budget": ("updates", "budget", *(f"budget.{kind}" for kind in KINDS)),
    "--every": ("evaluation.every",),
}


@dataclass(frozen=True)
class Method:
    """settings: its resolved config, without what is each unit's own; folder: under `units/`."""

    label: str
    folder: str
    settings: dict[str, Any] = field(hash=False)


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
        return ["train", str(place.parent / "config.yaml"), f"seed={self.seed}", f"run_dir={place}"]

    def line(self) -> str:
        """The same for a shell."""
        return shlex.join(["diffalign", *self.command()])


@dataclass(frozen=True)
class Asked:
    """What all units share. budget: a kind of `KINDS` and how much of it; every: updates between evaluations, 0 for none in between; allow:
    keys that methods may differ in; target: a judge and the score whose cost is asked for, None: the first method's."""

    budget: tuple[str, float]
    every: int = 0
    allow: tuple[str, ...] = ()
    target: tuple[str, float] | None = None

    def overrides(self) -> list[str]:
        """What of a config it decides."""
        kind, limit = self.budget
        amount = f"{limit:.17g}"
        own = [f"updates={amount}"] if kind == "updates" else [f"updates={ENDLESS}", f"budget.{kind}={amount}"]
        return [*own, f"evaluation.every={self.every}", *([f"output.sample_every={self.every}"] if self.every else [])]


@dataclass(frozen=True)
class Wish:
    """What a command asks for, as `Asked`; None where it does not say."""

    budget: tuple[str, float] | None = None
    every: int | None = None
    allow: tuple[str, ...] = ()
    target: tuple[str, float] | None = None


@dataclass(frozen=True)
class Comparison:
    """A folder of units. runs: how each command that trained was run, with its date."""

    place: Path
    asked: Asked
    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    runs: tuple[dict[str, Any], ...] = field(default=())

    @property
    def units(self) -> list[Unit]:
        """Every method with every seed, seed by seed, so that a stop leaves whole seeds."""
        return [
            Unit(method, seed, self.place / UNITS / method.folder / f"seed_{seed}")
            for seed in self.seeds
            for method in self.methods
        ]

    def save(self) -> None:
        """Write `comparison.json`."""
        facts = {
            "format": FORMAT,
            "diffalign": diffalign.__version__,
            "asked": asdict(self.asked),
            "seeds": list(self.seeds),
            "methods": [asdict(method) for method in self.methods],
            "runs": list(self.runs),
        }
        write_text(self.place / FILE, json.dumps(facts, indent=1) + "\n")

    def noted(self, run: dict[str, Any]) -> None:
        """Write down how a command trains."""
        replace(self, runs=(*self.runs, run)).save()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from training here.

        Raises:
            UserError: if one does.
        """
        lock = filelock.FileLock(self.place.absolute() / LOCK, timeout=0, thread_local=False)
        try:
            lock.acquire()
        except filelock.Timeout as error:
            raise UserError(f"--out: {self.place} is in use by another process; wait, or --report") from error
        try:
            yield
        finally:
            lock.release()

    @classmethod
    def read(cls, place: Path) -> Comparison:
        """Read what `save` wrote, wherever the folder is now.

        Raises:
            UserError: if it is damaged or another version's.
        """
        path = place / FILE
        try:
            facts = json_text.parse(path.read_bytes())
            if facts["format"] != FORMAT:
                raise UserError(f"--out: {path} has format {shown(facts['format'])}, this version reads {FORMAT}")
            asked = facts["asked"]
            target = None if asked["target"] is None else (str(asked["target"][0]), float(asked["target"][1]))
            kind, limit = asked["budget"]
            return cls(
                place,
                Asked((str(kind), float(limit)), int(asked["every"]), tuple(asked["allow"]), target),
                tuple(Method(m["label"], m["folder"], shared(m["settings"])) for m in facts["methods"]),
                tuple(map(int, facts["seeds"])),
                tuple(facts["runs"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--out: {path} is damaged ({one_line(error)}); choose another folder") from error


def open_comparison(words: Sequence[str], seeds: Sequence[int], wish: Wish, place: Path) -> Comparison:
    """The comparison in a folder, with what joins it; written down, and a config for each method beside its units.

    words: CONFIG[@KEY=VALUE]... [KEY=VALUE]..., none to go on with what is there.

    Raises:
        UserError: with every mistake; where methods, or what was asked before, differ in what they must share: with the difference.
    """
    there = Comparison.read(place) if (place / FILE).is_file() else None
    asked = _agreed(there, wish, place)
    found = _configs(words, asked)
    before = there or Comparison(place, asked, (), ())
    whole = replace(
        before,
        asked=asked,
        methods=_labelled(before.methods, list(found.values())),
        seeds=tuple(dict.fromkeys([*before.seeds, *seeds])),
    )
    missing = {"compare: no CONFIG given": whole.methods, "--seeds: none given, such as 0,1,2": whole.seeds}
    if problems := [problem for problem, given in missing.items() if not given]:
        raise UserError(*problems)
    alike.check([(method.label, method.settings) for method in whole.methods], asked.allow)
    make_folder(place, "--out")
    if there is None and any(place.iterdir()):
        raise UserError(f"--out: {place} holds other files and no comparison; name another folder")
    by_settings = {json.dumps(shared(config.model_dump(mode="json"))): config for config in found.values()}
    for method in whole.methods:
        path = place / UNITS / method.folder / "config.yaml"
        if (config := by_settings.get(json.dumps(method.settings))) is not None and not path.is_file():
            make_folder(path.parent, "--out")
            write_text(path, configs.dump(config))
    whole.save()
    return whole


def _agreed(there: Comparison | None, wish: Wish, place: Path) -> Asked:
    """What is asked, held against what was asked before."""
    if there is None:
        if wish.budget is None:
            kinds = ", ".join(f"{kind}=N" for kind in KINDS)
            raise UserError(f"--budget: none given, and {place} holds no comparison; allowed is one of {kinds}")
        return Asked(wish.budget, wish.every or 0, wish.allow, wish.target)
    old = there.asked
    pairs = (("--budget", old.budget, wish.budget), ("--every", old.every, wish.every))
    if differ := [f"  {name}: {_said(was)} -> {_said(now)}" for name, was, now in pairs if now not in (None, was)]:
        raise UserError(f"--out: {place} holds a comparison with other settings; name another folder", *differ)
    return replace(old, allow=tuple(dict.fromkeys([*old.allow, *wish.allow])), target=wish.target or old.target)


def _said(value: Any) -> str:
    return f"{value[0]}={value[1]:.10g}" if isinstance(value, tuple) else str(value)


def _configs(words: Sequence[str], asked: Asked) -> dict[str, Config]:
    """CONFIG[@KEY=VALUE]... -> the config that its units are trained by."""
    names, shared = apart(words)
    found: dict[str, Config] = {}
    problems = [f"{name}: given twice" for name in twice(names)]
    for option, keys in DECIDED.items():
        given = [key for key in named(words) if key in keys]
        problems += [f"{key}: {option} says it, for all" for key in given]
    for name in dict.fromkeys(names):
        place, settings = changes(name)
        try:
            found[name] = configs.load(place, [*shared, *settings, *asked.overrides(), "seed=0", "run_dir=of a unit"])
        except UserError as error:
            problems += [f"{name}: {problem}" for problem in error.problems]
    if problems:
        raise UserError(*problems)
    return found


def shared(settings: dict[str, Any]) -> dict[str, Any]:
    """What all units of a method share, of settings of whatever version."""
    return {key: value for key, value in configs.completed(settings).items() if key not in OWN}


def _labelled(before: Sequence[Method], found: Sequence[Config]) -> tuple[Method, ...]:
    """Methods that were there, under the labels they had, and new ones."""
    known = [method.settings for method in before]
    new = [settings for config in found if (settings := shared(config.model_dump(mode="json"))) not in known]
    if same := [a["rule"]["name"] for k, a in enumerate(new) if a in new[:k]]:
        raise UserError(*(f"{name}: given twice with the same settings" for name in same))
    every = [*known, *new]
    names = [settings["rule"]["name"] for settings in every]
    shown = []
    for name, own in zip(names, every, strict=True):
        others = [other for other, named in zip(every, names, strict=True) if named == name]
        shown.append({key for other in others for key in configs.differences(other, own)})
    flat = [dict(configs.flat(settings)) for settings in every]
    methods = list(before)
    for label, settings in list(zip(labels(names, flat, shown), every, strict=True))[len(known) :]:
        taken = {method.folder for method in methods}
        plain = re.sub(r"[^A-Za-z0-9._=-]+", "-", label)[:60].strip("-.")
        folder = plain if plain not in taken else next(f for k in range(2, 10**6) if (f := f"{plain}-{k}") not in taken)
        methods.append(Method(label, folder, settings))
    return tuple(methods)
