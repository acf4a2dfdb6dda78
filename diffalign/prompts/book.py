"""All prompts of a run, read once: what training, evaluation and `plan` see is one thing, whatever happens to the files meanwhile."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffalign.errors import UserError
from diffalign.prompts.files import Entry, read
from diffalign.prompts.sets import has_splits
from diffalign.prompts.stages import Stages, misfits, of, table
from diffalign.runtime.randomness import Purpose, key, numpy_generator
from diffalign.types import Prompts


@dataclass(frozen=True)
class Book:
    """The prompts of a run.

    training, evaluation: entries, each with at least `prompt`; stages, evaluation_stages: what the sampler is told instead of a
    prompt on each stretch of the chain, empty without; stretches: their first steps; held_out: how many entries might be evaluated;
    rest: a name for all of those.
    """

    training: list[Entry]
    evaluation: list[Entry] = field(default_factory=list)
    stages: Stages = field(default_factory=dict)
    evaluation_stages: Stages = field(default_factory=dict)
    stretches: tuple[int, ...] = (0,)
    held_out: int = 0
    rest: str = ""

    @property
    def extent(self) -> str:
        """How many of the prompts that might be evaluated are."""
        count = len(self.evaluation)
        return f"{count} prompts" if count == self.held_out else f"{count} of {self.held_out} prompts, evenly spread,"

    @classmethod
    def read(cls, training: Any, evaluation: Any, steps: int) -> Book:
        """Read every file that a config's `prompts` and `evaluation` name, each once; `steps`: of the sampler, which stretches divide.

        Raises:
            UserError: with every mistake found.
        """
        trained, judged, held, rest = _entries(training, evaluation)
        written = None if training.stages is None else table(training.stages)
        stages = of(written, trained, training.stages)
        judged_stages = of(written, judged, training.stages) if evaluation.stages else {}
        counts = {len(texts) for texts in (*stages.values(), *judged_stages.values())}
        problems = misfits(training.stretches, evaluation.stages, counts, steps)
        if problems:
            raise UserError(*problems)
        count = len(next(iter(stages.values()), ("",)))
        evenly = tuple(k * steps // count for k in range(count))
        first = evenly if training.stretches is None else tuple(training.stretches)
        return cls(trained, judged, stages, judged_stages, first, held, rest)

    @property
    def entries(self) -> list[Entry]:
        """Those that are trained on, then those that are evaluated."""
        return [*self.training, *self.evaluation]

    @property
    def texts(self) -> list[str]:
        """Everything that the text encoders will be asked for, each once."""
        prompts = (entry["prompt"] for entry in self.entries)
        staged = (
            text for stages in (self.stages, self.evaluation_stages) for texts in stages.values() for text in texts
        )
        return list(dict.fromkeys([*prompts, *staged]))

    @property
    def shared(self) -> bool:
        """Whether a prompt is trained on and evaluated."""
        return not {entry["prompt"] for entry in self.training}.isdisjoint(entry["prompt"] for entry in self.evaluation)

    def draw(self, groups: int, group_size: int, seed: int, update: int) -> Prompts:
        """What an update samples."""
        return draw(self.training, groups, group_size, seed, update, self.stages)

    def fixed(self, images_per_prompt: int, seed: int) -> Prompts:
        """What every evaluation samples."""
        return fixed(self.evaluation, images_per_prompt, seed, self.evaluation_stages)

    @property
    def content(self) -> str:
        """A name for what was read."""
        read = [self.training, self.evaluation, self.stages, self.evaluation_stages, self.stretches]
        return _digest(read)

    def digest(self, judged: Prompts) -> str:
        """A name for all of it, with the evaluation's prompts as `fixed` gives them."""
        content = [self.training, self.stages, judged.text, judged.stages, judged.metadata]
        return _digest(content)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _entries(training: Any, evaluation: Any) -> tuple[list[Entry], list[Entry], int, str]:
    """What is trained on, what is evaluated, of how many that was taken, and a name for those."""
    source = evaluation.source or training.source
    tasks = training.tasks if evaluation.tasks is None else evaluation.tasks
    once = cache(lambda place: read(place, (), ""))  # a file without splits of its own is read once for both
    read_entries: list[list[Entry]] = []
    problems: list[str] = []
    for place, chosen, split in ((training.source, training.tasks, training.split), (source, tasks, evaluation.split)):
        try:
            read_entries.append(read(place, chosen, split) if has_splits(place) else once(place))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*dict.fromkeys(problems))
    trained, judged = read_entries
    if evaluation.enabled and evaluation.source is None and not has_splits(training.source):
        texts = {entry["prompt"] for entry in trained}
        few = len(texts) < 2 * evaluation.least and "holdout" not in evaluation.model_fields_set
        trained, judged = held_out(trained, 0.0 if few else evaluation.holdout, evaluation.least)
    most = min(evaluation.prompts or len(judged), len(judged))
    return trained, [judged[k * len(judged) // most] for k in range(most)], len(judged), _digest(judged)


def held_out(entries: list[Entry], share: float, least: int = 0) -> tuple[list[Entry], list[Entry]]:
    """Entries to train on and entries to evaluate on: that share of the texts, those whose hashes are lowest, so that a text stays on
    its side whatever else is in the file. Of few texts none is held out, and both are all entries.

    least: how many are held out where a share is asked for and at least as many are left to train on.
    """
    texts = {entry["prompt"] for entry in entries}
    order = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
    wanted = max(round(share * len(order)), least if share and 2 * least <= len(order) else 0)
    held = set(order[: min(wanted, len(order) - 1)])
    if not held:
        return entries, entries
    parts: tuple[list[Entry], list[Entry]] = ([], [])
    for entry in entries:
        parts[entry["prompt"] in held].append(entry)
    return parts


def draw(
    entries: list[Entry], groups: int, group_size: int, seed: int, update: int, stages: Stages | None = None
) -> Prompts:
    """`groups` prompts of one pass after another over shuffled entries, each `group_size` times, with keys for noise."""
    places = [divmod(position, len(entries)) for position in range(update * groups, (update + 1) * groups)]
    picks = [int(_order(seed, lap, len(entries))[place]) for lap, place in places]
    count = groups * group_size
    group = np.repeat(np.arange(groups), group_size)
    chosen = [entries[picks[g]] for g in group]
    return Prompts(
        text=[entry["prompt"] for entry in chosen],
        group=group,
        seed=np.array([key(seed, Purpose.SAMPLE, update, k) for k in range(count)]),
        group_seed=np.array([key(seed, Purpose.GROUP, update, int(g)) for g in group]),
        metadata=chosen,
        stages=_stages_of(chosen, stages),
    )


@lru_cache(maxsize=2)  # a pass is drawn once, however many updates it lasts
def _order(seed: int, lap: int, count: int) -> NDArray[np.int64]:
    return numpy_generator(seed, Purpose.ORDER, lap).permutation(count)


def _stages_of(chosen: list[Entry], stages: Stages | None) -> list[tuple[str, ...]]:
    return [stages[entry["prompt"]] for entry in chosen] if stages else []


def same_text(entries: Sequence[Entry]) -> NDArray[np.int64]:
    """Ids (n,) of prompts: entries with one text, whatever their metadata, are one prompt when samples are compared."""
    names: dict[str, int] = {}
    return np.array([names.setdefault(entry["prompt"], len(names)) for entry in entries], dtype=np.int64)


def fixed(entries: list[Entry], images_per_prompt: int, seed: int, stages: Stages | None = None) -> Prompts:
    """Every entry `images_per_prompt` times with fixed seeds, whatever the update: for evaluation."""
    places = np.repeat(np.arange(len(entries)), images_per_prompt)
    seeds = np.array([key(seed, Purpose.FIXED, k) for k in range(len(places))])
    chosen = [entries[k] for k in places]
    group = same_text(entries)[places]
    texts = [entry["prompt"] for entry in chosen]
    return Prompts(texts, group, seeds, seeds, chosen, _stages_of(chosen, stages))
