"""What rewards there are, without importing one: each file in `reward_models/` begins with a literal `REWARDS`.

    REWARDS = {"name": {"object": "Class or function", "differentiable": False, "modality": "image", "about": "one line"}}

with `range`, `needs` (keys of the prompts' metadata), `weights` (where its weights are, with a class that takes another place:
`name@PLACE`), `licence`, `memory` (GiB of its weights), `narrow` (on a card they are bfloat16, in evaluations too), `kept` (GiB that stay
bfloat16 in `NAME+int8` and `NAME+nf4`, which it has then, and a class that takes the way as `quantize`), `extra` (a module of an optional
extra), `background` (it works on the CPU, while sampling goes on), `timed` (it needs videos' frames per second), `column` (its object is a
judge that gives several numbers, and this is one of them), `template` (what `rewards fetch` looks for) and `family` (the data or model it
learned from, one name for all that share it) where they apply. What `rewards check` shows and expects: `shown` ("text": writing, "sign": a
stop sign, else shapes), and of its three samples, one as asked, another one and noise, the `known` scores within `tolerance`, or that they
are `ordered`: the first above the second.

Any Python function `f(media, prompts)` works too, as `./file.py:function` or `package.module:function`, and those that were written for
other trainers (see `takes`), `#part` after the name picks one of several scores; a module-level
`DIFFERENTIABLE = ["function"]` says which of its functions have a gradient to the pixels. An installed package gives it a bare name by
an entry point in the group `diffalign.rewards`. `http://host:port/score` is a reward behind a server, several addresses with | between
them one behind several.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import urllib.parse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from diffalign.errors import UserError
from diffalign.rewards import metadata, takes
from diffalign.rewards.parsing import defined, literal, parsed
from diffalign.runtime.extras import missing
from diffalign.runtime.files import HUB_ID, is_file
from diffalign.runtime.precision import PRECISIONS, QUANTIZED, QUANTIZERS


@dataclass(frozen=True)
class Entry:
    """Where a reward is and what it promises. needs: keys its samples' metadata must have; weights: where its weights are unless
    `place` says otherwise; extra: the module it needs from an optional extra; range: of its scores; memory: GiB of its weights;
    narrow: whether they are bfloat16; kept: GiB of them that stay so where they are quantised, 0: they cannot be; quantize: how they are;
    background: it may score in a thread of its own; timed: it needs frames per second; column: of a
    judge's numbers; template: where the text that it asks with is; family: the data or model that it learned from, which others share;
    urls: of its servers; part: of what a user's function returns; known, tolerance, ordered: what `rewards check` expects."""

    name: str
    source: str  # a module name or a file
    attribute: str  # in it; of a user's perhaps a method of what is there: thing.score
    differentiable: bool = False
    modality: str = "any"  # image: sees one frame at a time; video: needs several; any: gets what there is
    about: str = ""
    needs: tuple[str, ...] = ()
    weights: str = ""
    licence: str = ""
    extra: str = ""
    range: str = ""
    memory: float = 0.0
    narrow: bool = False
    kept: float = 0.0
    quantize: str = "none"
    background: bool = False
    timed: bool = False
    column: str = ""
    template: Mapping[str, Any] = field(default_factory=dict, hash=False)
    family: str = ""
    shown: str = ""
    known: tuple[float, ...] = ()
    tolerance: float = 1e-6
    ordered: bool = False
    place: str | None = None
    urls: tuple[str, ...] = ()
    part: str = ""

    @property
    def network(self) -> str:
        """A name for its weights: rewards of one judge share them."""
        held = "" if self.quantize == "none" else f"+{self.quantize}"
        return f"{self.source}:{self.attribute}{held}@{self.place}" if self.column else self.name

    @property
    def missing(self) -> str:
        """What it needs and is not installed, with the command that installs it; empty if nothing is missing."""
        for module in filter(None, (self.extra, QUANTIZERS.get(self.quantize))):
            if mend := missing(module):
                return f"{module}; {mend}"
        return ""

    def quantized(self, how: str) -> Entry:
        """The same with linear layers in `how`, without a gradient.

        Raises:
            LookupError: if it has no such form.
        """
        if how not in QUANTIZED or not self.kept:
            able = ", ".join(key for key, entry in builtin().items() if entry.kept)
            raise LookupError(
                f"got {self.name}+{how}; allowed are {' and '.join(f'+{h}' for h in QUANTIZED)}, of {able}"
            )
        size = self.kept + (self.memory - self.kept) * QUANTIZED[how] / PRECISIONS["bfloat16"]
        return replace(self, name=f"{self.name}+{how}", quantize=how, differentiable=False, memory=round(size, 1))

    @property
    def places(self) -> tuple[str, ...]:
        """Where its weights are, and the file of `PLACE;FILE`; a place that is there whole is one, whatever its name has in it."""
        place = self.place or self.weights
        return tuple(part for part in ([place] if Path(place).exists() else place.split(";", 1)) if part)

    def unfit(self, prompts: Iterable[dict[str, Any]]) -> str:
        """What prompts' metadata lack that this reward needs, or have in another form; empty if they fit."""
        for prompt in prompts:
            for key in self.needs:
                if key not in prompt:
                    return f"needs {key!r} in every prompt's metadata"
                if wanted := metadata.wanted(key, prompt[key]):
                    return f"got {key!r} {prompt[key]!r} of {prompt.get('prompt')!r}, allowed is {wanted}"
        return ""


def _differentiable(body: list[ast.stmt], function: str, source: str) -> bool:
    declared = literal(body, "DIFFERENTIABLE")
    if declared is None or isinstance(declared, bool):
        return bool(declared)
    names = [declared] if isinstance(declared, str) else list(declared)
    if unknown := [str(name) for name in names if name not in defined(body)]:
        raise LookupError(f"{source}: DIFFERENTIABLE names {', '.join(unknown)}, which it does not define")
    return function in names


@cache
def builtin() -> dict[str, Entry]:
    """The rewards of `reward_models`, by name."""
    spec = importlib.util.find_spec("reward_models")
    assert spec is not None
    assert spec.submodule_search_locations
    entries: dict[str, Entry] = {}
    for path in sorted(Path(spec.submodule_search_locations[0]).glob("[!_]*.py")):
        facts_of = literal(parsed(path), "REWARDS")
        assert facts_of, f"{path.name} has no literal REWARDS"
        for name, facts in facts_of.items():
            known = {field.name for field in fields(Entry)} & facts.keys()
            assert known | {"object"} == facts.keys(), f"{path.name}: {name} has unknown facts"
            given = {key: facts[key] for key in known} | {k: tuple(facts.get(k, ())) for k in ("needs", "known")}
            entries[name] = Entry(name, f"reward_models.{path.stem}", facts["object"], **given)
    return entries


def shipped(name: str) -> str:
    """The name in `reward_models` of a reward with or without a place, quantised or not; any other name as it is."""
    bare = name.partition("@")[0].partition("+")[0]
    return bare if bare in builtin() else name


def plugged(name: str) -> str | None:
    """`module:attr` of an entry point of that name in the group `diffalign.rewards`, if an installed package has one."""
    from importlib.metadata import entry_points

    points = list(entry_points(group="diffalign.rewards", name=name))
    return points[0].value if points else None


def _served(name: str) -> Entry:
    urls = tuple(name.split("|"))
    for url in urls:
        try:
            parts = urllib.parse.urlsplit(url)
            whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # a port that is no number, or too large
            whole = False
        if not whole:
            raise LookupError(f"{url!r} is no address; allowed is http://host:port/score, several with | between them")
        if parts.username or parts.password:
            raise LookupError("an address with a password would be written into the run; set DIFFALIGN_REWARD_TOKEN")
    return Entry(name, "diffalign.rewards.remote", "Remote", background=True, about="behind a server", urls=urls)


def find(name: str) -> Entry:
    """The entry of a bare name, `name@PLACE`, an address, `./file.py:function` or `package.module:function`.

    Raises:
        LookupError: one line that says what is wrong and what is allowed.
    """
    known = builtin()
    if name in known:
        return known[name]
    if "://" in name.partition("@")[0]:
        return _served(name)
    bare, at, place = name.partition("@")
    stem, plus, how = bare.partition("+")
    if plus and stem in known:
        known = {**known, bare: known[stem].quantized(how)}
        if not at:
            return known[bare]
    if at and bare in known:
        if not known[bare].weights or not place:
            able = ", ".join(key for key, entry in known.items() if entry.weights)
            raise LookupError(f"got {name!r}; NAME@PLACE is for rewards with weights: {able}")
        return replace(known[bare], name=name, place=place)
    bare, mark, part = name.partition("#")
    point = None if ":" in bare else plugged(bare)
    return _function(name, name if point is None else f"{point}{mark}{part}")


def known(name: str, field: str) -> Entry:
    """The same, for a command whose `field` names it.

    Raises:
        UserError: instead of LookupError.
    """
    try:
        return find(name)
    except LookupError as error:
        raise UserError(f"{field}: {name}: {error}") from error


def _function(name: str, place: str) -> Entry:
    """The entry of `./file.py:function` or `package.module:function`."""
    known = builtin()
    source, _, attribute = place.rpartition(":")
    attribute, marked, part = attribute.partition("#")
    if marked and not part:
        raise LookupError(f"got {name!r}; after # stands a part of its answer, such as {name}VQ")
    if not source:
        if name.endswith(".py"):
            raise LookupError(f"got {name!r}; name the function in it: {name}:FUNCTION")
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]}" if near else ""
        raise LookupError(
            f"unknown reward{hint}; known are {', '.join(known)}; or ./file.py:function, http://host/score"
        )
    if source.endswith(".py"):
        path = Path(source)
        if not is_file(path):
            raise LookupError(f"no file {source}")
        try:
            body = parsed(path)
        except SyntaxError as error:
            raise LookupError(f"{source} line {error.lineno}: {error.msg}") from error
        except ValueError as error:
            raise LookupError(f"{source} is not Python text ({error})") from error
        names = defined(body)
        if attribute.partition(".")[0] not in names and "*" not in names:
            raise LookupError(
                f"{source} defines no function {attribute!r}, it defines {', '.join(sorted(names)) or 'nothing'}"
            )
        try:
            takes.check_source(body, attribute, literal(body, "TAKES"))
        except takes.Unrecognised as error:
            raise LookupError(str(error)) from error
        return Entry(name, str(path.resolve()), attribute, _differentiable(body, attribute, source), part=part)
    try:
        spec = importlib.util.find_spec(source)
    except (ImportError, ValueError) as error:
        raise LookupError(f"no module {source} ({error})") from error
    if spec is None:
        raise LookupError(f"no module {source}")
    known_source = spec.origin and spec.origin.endswith(".py")
    return Entry(
        name,
        source,
        attribute,
        bool(known_source) and _differentiable(parsed(Path(str(spec.origin))), attribute, source),
        part=part,
    )


def problems(name: str, prompts: Iterable[dict[str, Any]], fps: float | None = None) -> tuple[list[str], str]:
    """What keeps a reward from being used, each to stand after its name; and what these prompts lack for it, empty if they fit. fps: of
    videos, None: not known."""
    try:
        entry = find(name)
    except LookupError as error:
        return [f": {error}"], ""
    place = entry.place or ""
    elsewhere = HUB_ID.fullmatch(place.partition(";")[0]) or place.startswith(("http://", "https://"))
    problems = [
        f": {part} is not there; allowed is a file" + ("" if place.endswith(f";{part}") else ", a folder or a hub id")
        for part in (entry.places if place else ())
        if not (Path(part).exists() or (elsewhere and place.startswith(part)))
    ]
    if entry.timed and fps is None:
        problems.append(
            " goes by time, and how many frames a second there are is not said; sampler.fps or --fps says it"
        )
    unfit = entry.unfit(prompts)
    return problems, f" {unfit}" if unfit else ""
