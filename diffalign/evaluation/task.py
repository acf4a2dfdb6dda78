"""What `diffalign evaluate` is asked for: prompts, what judges, how many samples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffalign.errors import UserError
from diffalign.prompts import files as prompt_files
from diffalign.prompts.sets import has_splits
from diffalign.rewards import catalog
from diffalign.runtime.files import home, is_file
from diffalign.runtime.randomness import Purpose, key


@dataclass(frozen=True)
class Suite:
    """Prompts ("": the user's), and the rewards that judge what is made of them; the first is the one that counts."""

    source: str
    rewards: tuple[str, ...]


SUITES = {
    "shapes": Suite("shapes", ("shapes_geneval", "shapes_geneval_strict")),
    "shapes-motion": Suite("shapes-motion", ("shapes_motion", "shapes_motion_partial")),
    "geneval": Suite("geneval-like", ("geneval_like",)),
    "pickscore": Suite("", ("pickscore", "clipscore", "hpsv2.1", "aesthetic")),
}


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

    @property
    def total(self) -> int:
        return len(self.entries) * self.samples

    def seed_of(self, row: int) -> int:
        """The generator's seed of a sample: the same for every model."""
        return key(self.seed, Purpose.SUITE, row) % 2**63

    def digest(self) -> str:
        """A name for the prompts."""
        return hashlib.sha256(json.dumps(self.entries, sort_keys=True).encode()).hexdigest()


def task_of(
    suite: str,
    prompts: str | None,
    rewards: Sequence[str],
    split: str,
    count: int,
    seed: int,
    batch: int,
    drift: bool = True,
) -> Task:
    """What a command line asks for.

    Raises:
        UserError: for an unknown suite, unreadable prompts, an unknown reward, or one that these prompts have nothing for.
    """
    known = SUITES.get(suite)
    if not suite or prompts == "":
        raise UserError(f"{'--prompts' if suite else '--suite'}: got '', allowed are {', '.join(SUITES)}, or a file")
    if not known and not has_splits(suite) and "@" not in suite and not is_file(Path(home(suite))):
        raise UserError(
            f"--suite: got {suite!r}, which is no file; allowed are {', '.join(SUITES)}, a file of prompts, or a set of them by name "
            "with --reward NAME"
        )
    source = prompts or (known.source if known else suite)
    if not source:
        raise UserError(f"--prompts: the suite {suite} needs some, such as partiprompts@FILE, drawbench@FILE or a file")
    entries = prompt_files.read(source, (), split, "--suite" if prompts is None else "--prompts")
    names = tuple(rewards) or (known.rewards if known else ())
    if not names:
        allowed = ", ".join(SUITES)
        raise UserError(
            f"--reward: none given; a file of prompts needs one at least, the suites with their own are {allowed}"
        )
    problems = []
    for name in names:
        others, unfit = catalog.problems(name, entries)
        problems += [f"--reward: {name}{problem}" for problem in (*others, unfit) if problem]
    if problems:
        raise UserError(*problems)
    return Task(source, split, entries, names, count, seed, batch, drift)
