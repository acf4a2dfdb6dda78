"""GenEval's six tasks in the shapes world: captions, metadata, scenes that satisfy them, and the splits.

Templates and metadata (`tag`, `include`, `exclude`, `prompt`) follow GenEval (arXiv 2310.11513). A *combination* is what a
caption asks for, whatever its wording: "a left of b" and "b right of a" are one. Splits never share a combination.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from diffalign.shapes.world import COLOURS, SHAPES, Object, Scene, place

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
SPLITS = ("train", "validation", "test")
NUMERALS = {2: "two", 3: "three", 4: "four"}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
AXIS_MARGIN = 1.6  # a relation is drawn with its offset this many times the other axis's, so that only one holds


@dataclass(frozen=True)
class Combination:
    """What a caption asks for: `things` are (shape, colour or None); `count` and `relation` where the task has one."""

    task: str
    things: tuple[tuple[str, str | None], ...]
    count: int = 1
    relation: str | None = None


def phrase(shape: str, colour: str | None) -> str:
    """A thing with its article: "an orange star"."""
    words = f"{colour} {shape}" if colour else shape
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def clause(shape: str, colour: str | None, count: int = 1) -> dict[str, Any]:
    """A clause of GenEval's `include`."""
    clause: dict[str, Any] = {"class": shape, "count": count}
    if colour:
        clause["color"] = colour
    return clause


def caption(combination: Combination, flip: bool = False) -> dict[str, Any]:
    """GenEval-style metadata of a combination; `flip` gives the other wording where there is one.

    In position clauses the first object is the reference and the second is the positioned one, as in GenEval.
    """
    task, things = combination.task, combination.things
    if task == "position":
        (subject, reference), relation = things, combination.relation
        if flip:
            subject, reference, relation = reference, subject, OPPOSITE[str(relation)]
        prompt = f"a photo of {phrase(*subject)} {relation} {phrase(*reference)}"
        include = [clause(*reference), {**clause(*subject), "position": [relation, 0]}]
        return {"tag": task, "include": include, "prompt": prompt}
    if task == "counting":
        (shape, colour), n = things[0], combination.count
        prompt = f"a photo of {NUMERALS[n]} {colour + ' ' if colour else ''}{shape}s"
        exclude = [{"class": shape, "count": n + 1}]
        return {"tag": task, "include": [clause(shape, colour, n)], "exclude": exclude, "prompt": prompt}
    ordered = things[::-1] if flip else things
    prompt = "a photo of " + " and ".join(phrase(*thing) for thing in ordered)
    return {"tag": task, "include": [clause(*thing) for thing in ordered], "prompt": prompt}


def combinations(task: str) -> list[Combination]:
    """Every combination of a task, in a fixed order."""
    pairs = list(itertools.combinations(SHAPES, 2))
    colours = list(itertools.permutations(COLOURS, 2))
    if task == "single_object":
        return [Combination(task, ((shape, None),)) for shape in SHAPES]
    if task == "colors":
        return [Combination(task, ((shape, colour),)) for shape in SHAPES for colour in COLOURS]
    if task == "counting":
        tints = (None, *COLOURS)
        return [Combination(task, ((s, c),), count=n) for s, c, n in itertools.product(SHAPES, tints, NUMERALS)]
    if task == "two_object":
        return [Combination(task, ((a, None), (b, None))) for a, b in pairs]
    if task == "color_attr":
        return [Combination(task, ((a, c), (b, d))) for a, b in pairs for c, d in colours]
    if task == "position":
        both: list[tuple[str | None, str | None]] = [(None, None), *colours]
        ordered = itertools.product(itertools.permutations(SHAPES, 2), ("left of", "above"), both)
        return [Combination(task, ((a, c), (b, d)), relation=relation) for (a, b), relation, (c, d) in ordered]
    raise ValueError(f"task: got {task!r}, allowed are {', '.join(TASKS)}")


@cache
def split(task: str, name: str) -> tuple[Combination, ...]:
    """The combinations of one split: test 2/7, validation 1/7 (at least one each), train the rest; fixed for ever."""
    if name not in SPLITS:
        raise ValueError(f"split: got {name!r}, allowed are {', '.join(SPLITS)}")
    everything = combinations(task)
    order = np.random.default_rng([20, TASKS.index(task)]).permutation(len(everything))
    n_test, n_val = max(1, round(len(order) * 2 / 7)), max(1, round(len(order) / 7))
    chosen = {"test": order[:n_test], "validation": order[n_test : n_test + n_val], "train": order[n_test + n_val :]}
    return tuple(everything[k] for k in sorted(chosen[name]))


def captions(task: str, name: str) -> list[dict[str, Any]]:
    """All metadata of a task's split, both wordings where there are two, in a fixed order."""
    entries: dict[str, dict[str, Any]] = {}
    for combination, flip in itertools.product(split(task, name), (False, True)):
        metadata = caption(combination, flip)
        entries.setdefault(metadata["prompt"], metadata)
    return list(entries.values())


def stages(prompt: str) -> tuple[str, str, str]:
    """Coarse, middle and fine prompts of a caption: shapes, numbers and places first, colours afterwards."""
    words = [word for word in prompt.split() if word not in COLOURS]
    following = [*words[1:], ""]
    articles = [
        ("an" if n[:1] in "aeiou" and n else "a") if w in ("a", "an") else w
        for w, n in zip(words, following, strict=True)
    ]
    return " ".join(articles), prompt, prompt


def scene(combination: Combination, rng: np.random.Generator) -> Scene:
    """A random scene that satisfies a combination: what the caption leaves open is uniform over what fits."""
    kinds = combination.things * combination.count
    while True:
        painted = [(shape, colour or COLOURS[rng.integers(len(COLOURS))]) for shape, colour in kinds]
        placed = _place_related(painted, combination.relation, rng) if combination.relation else place(painted, rng)
        if placed is not None:
            return placed


def _place_related(kinds: list[tuple[str, str]], relation: str, rng: np.random.Generator) -> Scene | None:
    placed = place(kinds, rng)
    if placed is None:
        return None
    subject, reference = placed
    dx, dy = subject.x - reference.x, subject.y - reference.y
    if max(abs(dx), abs(dy)) < AXIS_MARGIN * min(abs(dx), abs(dy)):
        return None
    return _turned(placed, relation, dx, dy)


def _turned(placed: Scene, relation: str, dx: float, dy: float) -> Scene | None:
    """The scene if its clear relation is the wanted one; with the two places exchanged if it is the opposite one.

    Objects of unequal size come nearer by the exchange: 1.5 % of position scenes have a gap under 2 pixels, and 0.2 % touch.
    """
    across = abs(dx) > abs(dy)
    found = ("left of" if dx < 0 else "right of") if across else ("above" if dy < 0 else "below")
    if found == relation:
        return placed
    if found != OPPOSITE[relation]:
        return None
    a, b = placed
    swapped = (Object(a.shape, a.colour, b.x, b.y, a.radius), Object(b.shape, b.colour, a.x, a.y, b.radius))
    fits = all(1 <= edge <= 63 for item in swapped for edge in item.box)
    return swapped if fits else None
