"""GenEval's tasks, templates and metadata (arXiv 2310.11513) on COCO's objects, from a generator of our own.

The rules and the numbers of test prompts are the published ones; the prompts are not, and neither are the scores comparable. Splits share
no combination: "a left of b" and "b right of a" are one. GenEval itself: `geneval@evaluation_metadata.jsonl`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

Entry = dict[str, Any]
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
NUMERALS = {2: "two", 3: "three", 4: "four"}
OPPOSITE = {"left of": "right of", "above": "below"}
TEST = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
TRAIN = 2000  # combinations of a task at most
_LIST = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, parking "
    "meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie, "
    "suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis "
    "racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, "
    "pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, computer mouse, tv remote, "
    "computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, "
    "hair drier, toothbrush"
)
OBJECTS = _LIST.split(", ")
PAINTED = [name for name in OBJECTS if name != "person"]  # nobody is asked for in a colour


def prompts(tasks: Sequence[str], split: str) -> list[Entry]:
    """Metadata of a split: the published 553 for test (all single objects among them), half as many for validation, the rest, up to 2,000
    a task, for training."""
    chosen = [task for task in TEST if not tasks or task in tasks]
    return [entry for task in chosen for entry in _split(task)[split]]


@cache
def _split(task: str) -> dict[str, list[Entry]]:
    rng = np.random.default_rng([20, 9, list(TEST).index(task)])
    combinations = _combinations(task, rng)
    order = rng.permutation(len(combinations))
    test, validation = TEST[task], TEST[task] // 2
    cuts = {"test": (0, test), "validation": (test, test + validation), "train": (test + validation, None)}
    found = {}
    for name, (start, stop) in cuts.items():
        picked = [combinations[k] for k in order[start:stop]][: TRAIN if name == "train" else None]
        found[name] = [_entry(task, combination, bool(rng.integers(2))) for combination in picked]
    return found


def _combinations(task: str, rng: np.random.Generator) -> list[Any]:
    """All combinations of a task; of the colour attributions as many as are needed."""
    if task == "single_object":
        return list(OBJECTS)
    if task == "two_object":
        return list(itertools.combinations(OBJECTS, 2))
    if task == "counting":
        return list(itertools.product(OBJECTS, NUMERALS))
    if task == "colors":
        return list(itertools.product(PAINTED, COLOURS))
    if task == "position":
        return list(itertools.product(itertools.permutations(OBJECTS, 2), OPPOSITE))
    pairs, colours = list(itertools.combinations(PAINTED, 2)), list(itertools.permutations(COLOURS, 2))
    picks = rng.choice(len(pairs) * len(colours), TRAIN + 2 * TEST[task], replace=False)
    return [(pairs[k // len(colours)], colours[k % len(colours)]) for k in picks]


def _a(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _entry(task: str, combination: Any, flip: bool) -> Entry:
    """Metadata of a combination; `flip` gives the other wording where there is one."""

    def made(prompt: str, *include: Entry, **more: Any) -> Entry:
        return {"tag": task, "include": list(include), **more, "prompt": f"a photo of {prompt}"}

    def clause(name: str, count: int = 1, **more: Any) -> Entry:
        return {"class": name, "count": count, **more}

    if task == "single_object":
        return made(_a(combination), clause(combination))
    if task == "counting":
        name, count = combination
        plural = name + ("es" if name.endswith("s") else "s")
        return made(f"{NUMERALS[count]} {plural}", clause(name, count), exclude=[{"class": name, "count": count + 1}])
    if task == "colors":
        name, colour = combination
        return made(f"{_a(colour)} {name}", clause(name, color=colour))
    if task == "position":
        (subject, reference), relation = combination
        if flip:
            subject, reference, relation = reference, subject, OPPOSITE[relation]
        return made(
            f"{_a(subject)} {relation} {_a(reference)}", clause(reference), clause(subject, position=[relation, 0])
        )
    if task == "two_object":
        first, second = combination[::-1] if flip else combination
        return made(f"{_a(first)} and {_a(second)}", clause(first), clause(second))
    things = list(zip(*combination, strict=True))
    (first, tint), (second, other) = things[::-1] if flip else things
    return made(f"{_a(tint)} {first} and {_a(other)} {second}", clause(first, color=tint), clause(second, color=other))
