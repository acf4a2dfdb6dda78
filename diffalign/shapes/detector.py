"""The exact judge of the shapes world: no learned part, numpy and scipy only.

1. Un-mix each pixel as a * colour + (1 - a) * background for the palette colour that leaves the smallest rest.
2. Connected components per colour; small specks are dropped.
3. Fit each shape's signed-distance outline to the component's sub-pixel box; the best soft IoU names the shape.
4. Residue: the share of pixels that are not background and lie in no accepted object's box.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from diffalign.ops.geneval import Detection
from diffalign.shapes.world import BACKGROUND, BOX, CENTROID, COLOURS, PALETTE, SHAPES, coverage
from diffalign.types import Floats

OPAQUE = 0.5  # a pixel belongs to a colour above this share
REST = 60.0  # RGB distance from every palette mix (in 0..255 units) beyond which a pixel has no colour
INK = 30.0  # largest channel difference from the background that still counts as background
SPECK = 20  # components below this many pixels are specks
ACCEPT = 0.78  # soft IoU an outline must reach: true renders reach 0.95, a square turned by 45 degrees 0.74
HOLE = 4  # enclosed pixels of another colour that make a ring of a shape
SCALES = (0.96, 1.0, 1.05, 1.1)  # tips thinner than a pixel make boxes look small

_BACKGROUND = np.array(BACKGROUND, dtype=float)
_RAYS = np.array([PALETTE[name] for name in COLOURS], dtype=float) - _BACKGROUND  # (colours, 3)


@dataclass(frozen=True)
class Rejected:
    """A component that is no object: its colour, box and the reason."""

    colour: str
    box: tuple[float, float, float, float]
    reason: str


@dataclass(frozen=True)
class Found:
    """What a picture holds: accepted objects, rejected components, and the share of unexplained pixels in [0, 1]."""

    objects: list[Detection]
    rejected: list[Rejected]
    residue: float


def unmix(image: NDArray[np.uint8]) -> tuple[Floats, NDArray[np.int64]]:
    """Share (h, w) in [0, 1] and index (h, w) of the best palette colour; the share is 0 where no colour fits."""
    offset = image.astype(float) - _BACKGROUND
    along, length = offset @ _RAYS.T, (_RAYS**2).sum(1)
    # With o = p - b and r = c - b: a = <o, r> / |r|^2, rest^2 = |o - a r|^2 = |o|^2 - 2 a <o, r> + a^2 |r|^2
    share = np.clip(along / length, 0.0, 1.0)
    rest = (offset**2).sum(-1, keepdims=True) - 2 * share * along + share**2 * length
    best = rest.argmin(-1)
    pick = best[..., None]
    share_best = np.take_along_axis(share, pick, -1)[..., 0]
    rest_best = np.take_along_axis(rest, pick, -1)[..., 0]
    return np.where(rest_best < REST**2, share_best, 0.0), best


def _edges(profile: Floats) -> tuple[float, float]:
    """Where a 1-d profile rises through and falls below one half, to a fraction of a pixel (in pixel edges)."""
    inside = np.flatnonzero(profile > OPAQUE)
    first, last = inside[0], inside[-1]
    before = profile[first - 1] if first > 0 else 0.0
    after = profile[last + 1] if last + 1 < len(profile) else 0.0
    # Coverage of the border pixels measures how far the outline reaches into them.
    start = first + (1 - profile[first]) - before
    end = last + profile[last] + after
    return float(start), float(end)


def _fit(mask: Floats, box: tuple[float, float, float, float], corner: tuple[int, int]) -> tuple[str, float]:
    """Best shape and its soft IoU, sum(min) / sum(max), for a soft mask (h, w) whose pixel (0, 0) is at `corner` (x, y)."""
    xs: Floats = corner[0] + np.arange(mask.shape[1], dtype=np.float64)[None, :] + 0.5
    ys: Floats = corner[1] + np.arange(mask.shape[0], dtype=np.float64)[:, None] + 0.5
    centre = (float((mask * xs).sum() / mask.sum()), float((mask * ys).sum() / mask.sum()))
    best = ("", 0.0)
    for shape in SHAPES:
        left, top, right, bottom = BOX[shape]
        radii = (box[2] - box[0]) / (right - left), (box[3] - box[1]) / (bottom - top)
        if not 0.8 < radii[0] / radii[1] < 1.25:
            continue
        for scale in SCALES:
            radius = scale * (radii[0] + radii[1]) / 2
            template = coverage(shape, centre[0], centre[1] - radius * CENTROID[shape], radius, xs, ys)
            iou = float(np.minimum(mask, template).sum() / np.maximum(mask, template).sum())
            if iou > best[1]:
                best = (shape, iou)
    return best


def _examine(share: Floats, component: NDArray[np.bool_], colour: str, corner: tuple[int, int]) -> Detection | Rejected:
    """Name one component, or say why it is no object; both arrays are a crop whose pixel (0, 0) is at `corner` (x, y)."""
    soft = np.where(ndimage.binary_dilation(component, iterations=2), share, 0.0)
    (x0, x1), (y0, y1) = _edges(soft.max(0)), _edges(soft.max(1))
    box = (x0 + corner[0], y0 + corner[1], x1 + corner[0], y1 + corner[1])
    if (ndimage.binary_fill_holes(component) & ~component).sum() >= HOLE:
        return Rejected(colour, box, "has a hole")
    shape, iou = _fit(soft, box, corner)
    if iou < ACCEPT:
        return Rejected(colour, box, f"no shape fits (best: {shape or 'none'}, IoU {iou:.2f})")
    return Detection(shape, colour, box, iou)


def detect(image: NDArray[np.uint8]) -> Found:
    """Find every shape in a picture.

    Args:
        image: (h, w, 3) uint8, RGB.

    Raises:
        ValueError: if the array has another shape or type.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image: got {image.shape} {image.dtype}, expected (height, width, 3) uint8")
    share, best = unmix(image)
    objects: list[Detection] = []
    rejected: list[Rejected] = []
    for index in np.unique(best[share > OPAQUE]):
        labels, _ = ndimage.label((best == index) & (share > OPAQUE))
        own = np.where(best == index, share, 0.0)
        for label, (rows, cols) in enumerate(ndimage.find_objects(labels), start=1):
            if (labels[rows, cols] == label).sum() < SPECK:
                continue
            if rows.start == 0 or cols.start == 0 or rows.stop == image.shape[0] or cols.stop == image.shape[1]:
                box = (float(cols.start), float(rows.start), float(cols.stop), float(rows.stop))
                rejected.append(Rejected(COLOURS[index], box, "cut off by the edge"))
                continue
            rows, cols = slice(max(0, rows.start - 3), rows.stop + 3), slice(max(0, cols.start - 3), cols.stop + 3)
            item = _examine(own[rows, cols], labels[rows, cols] == label, COLOURS[index], (cols.start, rows.start))
            if isinstance(item, Detection):
                objects.append(item)
            else:
                rejected.append(item)
    return Found(objects, rejected, _residue(image, objects))


def _residue(image: NDArray[np.uint8], objects: list[Detection]) -> float:
    unexplained = np.abs(image.astype(float) - _BACKGROUND).max(-1) > INK
    for item in objects:
        left, top, right, bottom = item.box
        unexplained[max(0, int(top) - 2) : int(bottom) + 3, max(0, int(left) - 2) : int(right) + 3] = False
    return float(unexplained.mean())
