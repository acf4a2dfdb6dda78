"""What `diffalign evaluate` is asked for: prompts, what judges, how many samples."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from diffalign.errors import UserError
from diffalign.evaluation.catalog import SUITES, Suite
from diffalign.prompts import files as prompt_files
from diffalign.prompts.book import same_text
from diffalign.prompts.sets import SETS, has_splits
from diffalign.prompts.sets.fetching import fetched
from diffalign.prompts.sets.published import PUBLISHED
from diffalign.rewards import catalog
from diffalign.runtime.files import home, is_file
from diffalign.runtime.randomness import Purpose, key
from diffalign.types import Integers, rows_by_group


@dataclass(frozen=True)
class Copy:
    """Where published prompts come from: the set, its copy's sha256, whether that is the published one (None: that one is not known
    here), and their licence."""

    name: str
    digest: str
    whole: bool | None
    licence: str


@dataclass(frozen=True)
class Task:
    """What is to be evaluated: `samples` pictures or videos of every prompt with each model's own call; `drift`: whether the predictions
    of adapters are compared with the base model's."""

    source: str
    split: str
    entries: list[prompt_files.Entry]
    rewards: tuple[str, ...]
    samples: int
    seed: int
    batch: int
    drift: bool = True
    name: str = ""
    suite: Suite = field(default_factory=Suite)
    copy: Copy | None = None

    @property
    def total(self) -> int:
        return len(self.entries) * self.samples

    @property
    def prompt(self) -> Integers:
        """Which prompt each sample is of (total,)."""
        return np.repeat(same_text(self.entries), self.samples)

    def together(self) -> list[list[int]]:
        """The samples of each prompt, by rows."""
        return [rows.tolist() for rows in rows_by_group(self.prompt)]

    def columns(self) -> dict[str, tuple[Integers, list[str]]]:
        """For every key of the suite's whose values are several: which of them each sample has (total,), and the values, in the order of
        the prompts."""
        found = {}
        for column in self.suite.columns:
            texts = [str(entry.get(column, "")) for entry in self.entries]
            names = list(dict.fromkeys(texts))
            if all(re.match(r"\d+\b", name) for name in names):
                names.sort(key=lambda name: int(re.match(r"\d+", name)[0]))  # type: ignore[index]
            if len(names) > 1:
                found[column] = np.repeat([names.index(text) for text in texts], self.samples), names
        return found

    @property
    def overall(self) -> str | None:
        """The column whose values' means are averaged to the suite's number; None: it is the mean over samples."""
        first = self.suite.columns[0] if self.suite.overall == "columns" and self.suite.columns else None
        return first if first in self.columns() else None

    @property
    def comparable(self) -> str:
        """What may be held against published numbers, and what not; empty if nothing is known of that."""
        if self.suite.comparable and self.copy is not None and self.copy.whole is False:
            return f"Not comparable with published numbers: these are not the published prompts of {self.copy.name}."
        return self.suite.comparable

    def seed_of(self, row: int) -> int:
        """The generator's seed of a sample: the same for every model."""
        return key(self.seed, Purpose.SUITE, row) % 2**63

    def digest(self) -> str:
        """A name for the prompts."""
        return hashlib.sha256(json.dumps(self.entries, sort_keys=True).encode()).hexdigest()


def task_of(
    suite: str,
    prompts: str | None,
    judges: Sequence[str],
    split: str,
    count: int | None,
    seed: int,
    batch: int,
    drift: bool = True,
    say: Callable[[str], None] = print,
    fps: float | None = None,
) -> Task:
    """What a command line asks for; `count` None: as many samples of a prompt as the suite has; fps: of videos, None: not known.

    Raises:
        UserError: for an unknown suite, unreadable prompts, an unknown reward, or one that these prompts have nothing for.
    """
    known = SUITES.get(suite)
    if not suite or prompts == "":
        raise UserError(f"{'--prompts' if suite else '--suite'}: got '', allowed are {', '.join(SUITES)}, or a file")
    if not known and not has_splits(suite) and "@" not in suite and not is_file(Path(home(suite))):
        raise UserError(
            f"--suite: got {suite!r}, which is no file; allowed are {', '.join(SUITES)}, a file of prompts, or a set of them by name "
            "with --judges NAME"
        )
    own = known or Suite(suite)
    source = _source(suite, own, prompts, say)
    entries = prompt_files.read(source, (), split, "--suite" if prompts is None else "--prompts")
    names = tuple(judges) or own.judges
    if not names:
        allowed = ", ".join(SUITES)
        raise UserError(
            f"--judges: none given; a file of prompts needs one at least, the suites with their own are {allowed}"
        )
    problems = []
    for name in names:
        others, unfit = catalog.problems(name, entries, fps)
        problems += [f"--judges: {name}{problem}" for problem in (*others, unfit) if problem]
    if problems:
        raise UserError(*problems)
    return Task(source, split, entries, names, count or own.samples, seed, batch, drift, suite, own, _copy(source))


def _source(name: str, suite: Suite, prompts: str | None, say: Callable[[str], None]) -> str:
    """Where the prompts are: those that were given, the suite's own, or the published ones, fetched."""
    published = suite.source.removesuffix("@")
    if published == suite.source:  # a set that ships, or the user's
        if not (source := prompts or suite.source):
            raise UserError(
                f"--prompts: the suite {name} needs some, such as partiprompts@FILE, drawbench@FILE or a file"
            )
        return source
    if prompts is None:
        return f"{published}@{fetched(published, '--prompts', say)}"
    named = prompts in SETS or prompts.partition("@")[0] in PUBLISHED
    return prompts if named else f"{published}@{home(prompts)}"  # a copy of the user's, laid out as published


def _copy(source: str) -> Copy | None:
    """What is known of the prompts' copy, if they are published ones."""
    name, at, place = source.partition("@")
    if not at or name not in PUBLISHED or PUBLISHED[name].splits:
        return None
    known, digest = PUBLISHED[name], PUBLISHED[name].digest_at(Path(place))
    return Copy(name, digest, digest == known.digest if known.digest else None, known.licence)
