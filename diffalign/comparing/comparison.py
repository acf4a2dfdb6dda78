"""What is compared: methods by label, seeds and a budget, kept as `comparison.json` in a folder. Needs no torch.

A unit is an ordinary run in `units/FOLDER/seed_K`. The folder goes on: methods and seeds join, what all methods share stays.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import diffalign
from diffalign.comparing import alike, tuned
from diffalign.comparing.methods import BUDGET, Method, Unit, labelled, loaded, reading, shared, within, write_config
from diffalign.comparing.words import KINDS
from diffalign.errors import UserError
from diffalign.runtime.files import make_folder, write_text

FILE, UNITS, FORMAT = "comparison.json", "units", 1
# option -> keys of a config that it decides
DECIDED = {
    "--seeds": ("seed",),
    "--out": ("run_dir",),
    "--budget": BUDGET,
    "--every": ("evaluation.every",),
}


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
        every = [f"evaluation.every={self.every}", *([f"output.sample_every={self.every}"] if self.every else [])]
        return [*within(self.budget), *every]


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

    @classmethod
    def read(cls, place: Path) -> Comparison:
        """Read what `save` wrote, wherever the folder is now.

        Raises:
            UserError: if it is damaged or another version's.
        """
        with reading(place / FILE, FORMAT) as facts:
            asked = facts["asked"]
            target = None if asked["target"] is None else (str(asked["target"][0]), float(asked["target"][1]))
            kind, limit = asked["budget"]
            return cls(
                place,
                Asked((str(kind), float(limit)), int(asked["every"]), tuple(asked["allow"]), target),
                tuple(Method(m["label"], m["folder"], shared(m["settings"]), m.get("tuned")) for m in facts["methods"]),
                tuple(map(int, facts["seeds"])),
                tuple(facts["runs"]),
            )


def open_comparison(words: Sequence[str], seeds: Sequence[int], wish: Wish, place: Path) -> Comparison:
    """The comparison in a folder, with what joins it; written down, and a config for each method beside its units.

    words: CONFIG[@KEY=VALUE]... [KEY=VALUE]..., none to go on with what is there.

    Raises:
        UserError: with every mistake; where methods, or what was asked before, differ in what they must share: with the difference.
    """
    there = Comparison.read(place) if (place / FILE).is_file() else None
    asked = _agreed(there, wish, place)
    found = loaded(words, [*asked.overrides(), "seed=0", "run_dir=of a unit"], DECIDED)
    made = [(shared(config.model_dump(mode="json")), path, config) for path, config in found.values()]
    before = there or Comparison(place, asked, (), ())
    new = [
        Method(word, "", settings, tuned.read(path, config))
        for word, (settings, path, config) in zip(found, made, strict=True)
    ]
    whole = replace(
        before,
        asked=asked,
        methods=labelled(before.methods, new),
        seeds=tuple(dict.fromkeys([*before.seeds, *seeds])),
    )
    missing = {"compare: no CONFIG given": whole.methods, "--seeds: none given, such as 0,1,2": whole.seeds}
    if problems := [problem for problem, given in missing.items() if not given]:
        raise UserError(*problems)
    alike.check([(method.label, method.settings) for method in whole.methods], asked.allow)
    make_folder(place, "--out")
    if there is None and any(place.iterdir()):
        raise UserError(f"--out: {place} holds other files and no comparison; name another folder")
    for method in whole.methods:
        for config in (config for settings, _, config in made if settings == method.settings):
            write_config(place / UNITS / method.folder, config)
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
