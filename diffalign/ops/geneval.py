"""GenEval's verdicts as arithmetic on detections: official, strict, and partial credit.

Official: the rules of GenEval (arXiv 2310.11513, `evaluation/evaluate_images.py` of its repository): clauses of `include` are
ANDed; a clause takes the `count` most confident detections of its class, so extra objects pass unless `exclude` forbids
them; a colour must hold for `count` of those; every positioned object must stand in its relation to every reference object.
Strict: official, and the picture holds exactly the wanted objects and nothing unexplained. Partial: mean credit in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

POSITION_MARGIN = 0.1  # GenEval's POSITION_THRESHOLD: share of the objects' sizes that an offset must exceed
DIRECTION = 0.5  # a relation holds where the unit offset exceeds this along its axis
CAP = 16  # detections kept per class

Box = tuple[float, float, float, float]
Metadata = dict[str, Any]


@dataclass(frozen=True)
class Detection:
    """One found object: class name, colour name, box (left, top, right, bottom; y downwards), confidence in [0, 1]."""

    name: str
    colour: str
    box: Box
    confidence: float = 1.0


@dataclass(frozen=True)
class Verdict:
    """Whether a picture passes, and the first reason why not (empty if it passes)."""

    correct: bool
    reason: str = ""


def keep(detections: Sequence[Detection], threshold: float) -> list[Detection]:
    """Detections above `threshold` (not at it), most confident first, at most 16 of a class."""
    kept: list[Detection] = []
    for item in sorted(detections, key=lambda d: -d.confidence):
        if item.confidence > threshold and sum(other.name == item.name for other in kept) < CAP:
            kept.append(item)
    return kept


def relations(a: Box, b: Box) -> set[str]:
    """Where box `a` lies as seen from box `b`; two relations can hold at once, or none."""
    offset = [(a[k] + a[k + 2] - b[k] - b[k + 2]) / 2 for k in (0, 1)]
    length = math.hypot(*offset)
    # revised = sign(offset) * max(|offset| - margin * (size_a + size_b), 0); direction = revised / |offset|
    room = [max(abs(offset[k]) - POSITION_MARGIN * (abs(a[k + 2] - a[k]) + abs(b[k + 2] - b[k])), 0) for k in (0, 1)]
    if max(room) < 1e-3:
        return set()
    dx, dy = (math.copysign(room[k], offset[k]) / length for k in (0, 1))
    checks = {"left of": dx < -DIRECTION, "right of": dx > DIRECTION, "above": dy < -DIRECTION, "below": dy > DIRECTION}
    return {name for name, holds in checks.items() if holds}


def _of_class(detections: Sequence[Detection], name: str) -> list[Detection]:
    return sorted((d for d in detections if d.name == name), key=lambda d: -d.confidence)


def official(detections: Sequence[Detection], metadata: Metadata) -> Verdict:
    """GenEval's published verdict on detections that were already thresholded (see `keep`)."""
    groups: list[list[Detection]] = []
    for clause in metadata["include"]:
        name, count, colour = clause["class"], clause["count"], clause.get("color")
        detected = _of_class(detections, name)[:count]
        if len(detected) < count:
            return Verdict(False, f"expected {count} {name}, found {len(detected)}")
        if colour and sum(d.colour == colour for d in detected) < count:
            return Verdict(False, f"expected {colour} {name}, found {', '.join(d.colour for d in detected)}")
        if "position" in clause:
            relation, target = clause["position"]
            if not all(relation in relations(a.box, b.box) for a in detected for b in groups[target]):
                return Verdict(False, f"{name} is not {relation} {metadata['include'][target]['class']}")
        groups.append(detected)
    for clause in metadata.get("exclude", ()):
        detected = _of_class(detections, clause["class"])
        if len(detected) >= clause["count"]:
            return Verdict(False, f"expected fewer than {clause['count']} {clause['class']}, found {len(detected)}")
    return Verdict(True)


def strict(detections: Sequence[Detection], metadata: Metadata, residue: float, limit: float = 0.01) -> Verdict:
    """Official, and exactly the wanted objects, and at most `limit` of the pixels (`residue`, in [0, 1]) unexplained."""
    verdict = official(detections, metadata)
    if not verdict.correct:
        return verdict
    wanted = sum(clause["count"] for clause in metadata["include"])
    if len(detections) != wanted:
        return Verdict(False, f"expected {wanted} objects in all, found {len(detections)}")
    if residue > limit:
        return Verdict(False, f"unexplained pixels: {residue:.1%}, allowed are {limit:.1%}")
    return verdict


def partial(detections: Sequence[Detection], metadata: Metadata) -> float:
    """Mean over terms, each clipped to [0, 1]: counts 1 - |n - k| / n, colours likewise, positions 0 or 1.

    A colour or position earns nothing while its count is wrong. The idea is Flow-GRPO's training reward (arXiv 2505.05470)
    without its negative scores and without the half credit it gives to wrong positions.
    """
    terms: list[float] = []
    groups: list[list[Detection]] = []
    for clause in metadata["include"]:
        name, count, colour = clause["class"], clause["count"], clause.get("color")
        detected = _of_class(detections, name)
        right = len(detected) == count
        terms.append(max(0.0, 1 - abs(count - len(detected)) / count))
        if colour:
            terms.append(max(0.0, 1 - abs(count - sum(d.colour == colour for d in detected)) / count) if right else 0.0)
        if "position" in clause:
            relation, target = clause["position"]
            pairs = [(a, b) for a in detected[:count] for b in groups[target]]
            holds = bool(pairs) and all(relation in relations(a.box, b.box) for a, b in pairs)
            terms.append(float(right and holds))
        groups.append(detected[:count])
    return sum(terms) / len(terms)
