"""GenEval's rules on hand-made detections, and against an independent brute-force form of the position rule."""

import itertools

import numpy as np
import pytest

from diffalign.ops import geneval
from diffalign.ops.geneval import Detection, official, partial, strict


def at(name, colour="red", x=10.0, y=10.0, size=10.0, confidence=0.95):
    return Detection(name, colour, (x - size / 2, y - size / 2, x + size / 2, y + size / 2), confidence)


def meta(*include, exclude=(), tag="t"):
    return {"tag": tag, "include": list(include), "exclude": list(exclude), "prompt": ""}


ONE = {"class": "circle", "count": 1}
RED = {"class": "circle", "count": 1, "color": "red"}
THREE = meta({"class": "circle", "count": 3}, exclude=[{"class": "circle", "count": 4}])


@pytest.mark.parametrize(
    ("found", "wanted", "passes", "strictly", "reason"),
    [
        ([at("circle")], meta(ONE), True, True, ""),
        ([], meta(ONE), False, False, "expected 1 circle, found 0"),
        ([at("circle"), at("star")], meta(ONE), True, False, "expected 1 objects in all, found 2"),
        ([at("circle"), at("circle")], meta(ONE), True, False, "expected 1 objects in all, found 2"),
        ([at("circle")] * 3, THREE, True, True, ""),
        ([at("circle")] * 2, THREE, False, False, "expected 3 circle, found 2"),
        ([at("circle")] * 4, THREE, False, False, "expected fewer than 4 circle, found 4"),
        ([at("circle")] * 3 + [at("star")], THREE, True, False, "expected 3 objects in all, found 4"),
        ([at("circle", "blue")], meta(RED), False, False, "expected red circle, found blue"),
        # only the most confident circle counts for the colour
        ([at("circle", "red", confidence=0.8), at("circle", "blue")], meta(RED), False, False, "found blue"),
        ([at("circle", "red"), at("circle", "blue", confidence=0.8)], meta(RED), True, False, "2"),
    ],
)
def test_verdicts(found, wanted, passes, strictly, reason):
    assert official(found, wanted).correct == passes
    verdict = strict(found, wanted, residue=0.0)
    assert verdict.correct == strictly
    assert reason in verdict.reason


def test_residue_fails_the_strict_verdict_alone():
    assert official([at("circle")], meta(ONE)).correct
    assert strict([at("circle")], meta(ONE), residue=0.01).correct
    verdict = strict([at("circle")], meta(ONE), residue=0.011)
    assert not verdict.correct
    assert "unexplained pixels" in verdict.reason


def positioned(relation):
    return meta({"class": "square", "count": 1}, {"class": "circle", "count": 1, "position": [relation, 0]})


@pytest.mark.parametrize(
    ("x", "y", "relation"), [(10, 32, "left of"), (54, 32, "right of"), (32, 10, "above"), (32, 54, "below")]
)
def test_first_clause_is_the_reference(x, y, relation):
    found = [at("square", x=32, y=32), at("circle", x=x, y=y)]
    for other in ("left of", "right of", "above", "below"):
        assert official(found, positioned(other)).correct == (other == relation)
        assert partial(found, positioned(other)) == pytest.approx(1.0 if other == relation else 2 / 3)


def brute_relations(a, b):
    """The rule written a second time, from its description in words."""
    names = set()
    ax, ay, bx, by = (a[0] + a[2]) / 2, (a[1] + a[3]) / 2, (b[0] + b[2]) / 2, (b[1] + b[3]) / 2
    length = ((ax - bx) ** 2 + (ay - by) ** 2) ** 0.5
    if length == 0:
        return names
    margin_x = 0.1 * ((a[2] - a[0]) + (b[2] - b[0]))
    margin_y = 0.1 * ((a[3] - a[1]) + (b[3] - b[1]))
    if (bx - ax - margin_x) / length > 0.5:
        names.add("left of")
    if (ax - bx - margin_x) / length > 0.5:
        names.add("right of")
    if (by - ay - margin_y) / length > 0.5:
        names.add("above")
    if (ay - by - margin_y) / length > 0.5:
        names.add("below")
    return names


def test_position_rule_agrees_with_brute_force_and_diagonals_hold_two():
    rng = np.random.default_rng(0)
    counts = {0: 0, 1: 0, 2: 0}
    for _ in range(2000):
        centre, size = rng.uniform(0, 64, (2, 2)), rng.uniform(4, 16, (2, 2))
        a, b = (tuple(np.concatenate([c - s / 2, c + s / 2])) for c, s in zip(centre, size, strict=True))
        assert geneval.relations(a, b) == brute_relations(a, b)
        counts[len(geneval.relations(a, b))] += 1
    assert geneval.relations((0, 0, 4, 4), (40, 40, 44, 44)) == {"left of", "above"}
    assert all(counts.values())


def test_every_pair_must_stand_in_the_relation():
    wanted = meta({"class": "square", "count": 2}, {"class": "circle", "count": 1, "position": ["left of", 0]})
    found = [at("square", x=40), at("square", x=50), at("circle", x=20)]
    assert official(found, wanted).correct
    assert not official([found[0], at("square", x=5), found[2]], wanted).correct


@pytest.mark.parametrize(("n", "credit"), [(0, 0.0), (1, 1 / 3), (2, 2 / 3), (3, 1.0), (4, 2 / 3), (6, 0.0), (9, 0.0)])
def test_partial_credit_of_counts_is_clipped(n, credit):
    assert partial([at("circle")] * n, THREE) == pytest.approx(credit)


def test_partial_credit_of_colours_needs_the_count():
    wanted = meta({"class": "circle", "count": 2, "color": "red"})
    assert partial([at("circle"), at("circle", "blue")], wanted) == pytest.approx((1 + 0.5) / 2)
    assert partial([at("circle")], wanted) == pytest.approx(0.25)


def test_partial_is_full_exactly_where_counts_colours_and_places_are_right():
    colours, shapes = ("red", "blue"), ("circle", "square")
    wanted = meta({"class": "circle", "count": 1, "color": "red"}, {"class": "square", "count": 1, "color": "blue"})
    for kinds in itertools.product(itertools.product(shapes, colours), repeat=2):
        found = [at(*kind) for kind in kinds]
        assert (partial(found, wanted) == 1) == strict(found, wanted, 0.0).correct


def test_thresholds_are_strict_and_sixteen_of_a_class_are_kept():
    many = [at("circle", confidence=0.5 + k / 100) for k in range(20)] + [at("star", confidence=0.3)]
    kept = geneval.keep(many, 0.3)
    assert len(kept) == 16
    assert min(d.confidence for d in kept) == pytest.approx(0.54)


def test_verdicts_do_not_depend_on_the_order_of_detections():
    rng = np.random.default_rng(1)
    for _ in range(200):
        found = [
            at(
                str(rng.choice(["circle", "square"])),
                str(rng.choice(["red", "blue"])),
                *rng.uniform(5, 60, 2),
                confidence=float(rng.uniform(0.8, 1)),
            )
            for _ in range(int(rng.integers(0, 5)))
        ]
        shuffled = [found[k] for k in rng.permutation(len(found))]
        for wanted in (THREE, meta(RED), positioned("above")):
            assert official(found, wanted) == official(shuffled, wanted)
            assert partial(found, wanted) == partial(shuffled, wanted)
