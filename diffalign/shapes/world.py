"""Scenes of coloured shapes on a plain background: the palette, the shapes and the renderer.

Pixel coordinates: x to the right, y downwards, a pixel's centre at integer + 0.5, units of pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffalign.types import Floats

SIZE = 64
BACKGROUND = (244, 244, 240)
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (215, 38, 38),
    "orange": (245, 138, 18),
    "yellow": (242, 214, 40),
    "green": (38, 158, 68),
    "blue": (38, 86, 208),
    "purple": (142, 58, 178),
}
COLOURS = tuple(PALETTE)
MARGIN = 1.5  # free pixels between an object's box and the canvas edge
GAP = 2.0  # free pixels between two objects
RADIUS = {1: (7.5, 13.0), 2: (7.5, 12.5), 3: (7.0, 10.0), 4: (7.0, 9.0)}  # by number of objects


def _circle(x: Floats, y: Floats) -> Floats:
    return np.hypot(x, y) - 1.0


def _square(x: Floats, y: Floats) -> Floats:
    return np.maximum(np.abs(x), np.abs(y)) - 0.88


def _triangle(x: Floats, y: Floats) -> Floats:
    # Upright: apex (0, -1.05), base corners (+-1.1, 0.85). The slanted sides have normal (1.9, -1.1) / |.|.
    slanted = (1.9 * np.abs(x) - 1.1 * (y + 1.05)) / np.hypot(1.9, 1.1)
    return np.maximum(slanted, y - 0.85)


def _star(x: Floats, y: Floats) -> Floats:
    # Five points, outer radius 1.2, inner radius 0.54. Folded into one wedge, the outline is a single line.
    outer, inner, wedge = 1.2, 0.54, np.pi / 5
    angle = np.mod(np.arctan2(x, -y), 2 * wedge)
    angle = np.minimum(angle, 2 * wedge - angle)
    radius = np.hypot(x, y)
    along, across = radius * np.cos(angle), radius * np.sin(angle)
    edge = np.array([inner * np.cos(wedge) - outer, inner * np.sin(wedge)])
    return ((along - outer) * edge[1] - across * edge[0]) / np.hypot(*edge)


# Signed distance (negative inside) of the shape of radius 1 around the origin, in units of the radius.
DISTANCE: dict[str, Callable[[Floats, Floats], Floats]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
}
SHAPES = tuple(DISTANCE)
# Box of the shape of radius 1: left, top, right, bottom.
_TIP, _FOOT = 1.2 * np.sin(2 * np.pi / 5), 1.2 * np.cos(np.pi / 5)
BOX: dict[str, tuple[float, float, float, float]] = {
    "circle": (-1.0, -1.0, 1.0, 1.0),
    "square": (-0.88, -0.88, 0.88, 0.88),
    "triangle": (-1.1, -1.05, 1.1, 0.85),
    "star": (-_TIP, -1.2, _TIP, _FOOT),
}
# Height of the centre of mass below the origin, radius 1.
CENTROID = {"circle": 0.0, "square": 0.0, "triangle": 0.65 / 3, "star": 0.0}


@dataclass(frozen=True)
class Object:
    """One shape: its name, colour name, centre and radius in pixels."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom in pixels."""
        left, top, right, bottom = (self.radius * edge for edge in BOX[self.shape])
        return self.x + left, self.y + top, self.x + right, self.y + bottom


Scene = tuple[Object, ...]


def coverage(shape: str, x: float, y: float, radius: float, xs: Floats, ys: Floats) -> Floats:
    """Share of each pixel a shape covers, in [0, 1], at pixel centres `xs` (1, w) and `ys` (h, 1)."""
    distance = DISTANCE[shape]((xs - x) / radius, (ys - y) / radius) * radius
    return np.clip(0.5 - distance, 0.0, 1.0)


def render(scene: Scene, size: int = SIZE) -> NDArray[np.uint8]:
    """Draw a scene, later objects over earlier ones: (size, size, 3) uint8."""
    image = np.empty((size, size, 3))
    image[:] = BACKGROUND
    centres: Floats = np.arange(size, dtype=np.float64) + 0.5
    for item in scene:
        left, top, right, bottom = item.box
        rows = slice(max(0, int(top) - 1), max(0, min(size, int(bottom) + 2)))
        cols = slice(max(0, int(left) - 1), max(0, min(size, int(right) + 2)))
        cover = coverage(item.shape, item.x, item.y, item.radius, centres[None, cols], centres[rows, None])[..., None]
        image[rows, cols] = (1 - cover) * image[rows, cols] + cover * np.array(PALETTE[item.colour])
    return np.round(image).astype(np.uint8)


def apart(first: Object, second: Object, gap: float = GAP) -> bool:
    """Whether two objects' boxes leave `gap` pixels between them on at least one axis."""
    a, b = first.box, second.box
    return b[0] - a[2] >= gap or a[0] - b[2] >= gap or b[1] - a[3] >= gap or a[1] - b[3] >= gap


def place(kinds: list[tuple[str, str]], rng: np.random.Generator, size: int = SIZE) -> Scene | None:
    """Put (shape, colour) objects at random, uniformly over sizes and free places; None if 60 throws did not fit."""
    low, high = RADIUS[min(len(kinds), 4)]
    placed: list[Object] = []
    for shape, colour in kinds:
        for _ in range(60):
            radius = rng.uniform(low, high)
            left, top, right, bottom = (radius * edge for edge in BOX[shape])
            x = rng.uniform(MARGIN - left, size - MARGIN - right)
            y = rng.uniform(MARGIN - top, size - MARGIN - bottom)
            candidate = Object(shape, colour, x, y, radius)
            if all(apart(candidate, other) for other in placed):
                placed.append(candidate)
                break
        else:
            return None
    return tuple(placed)
