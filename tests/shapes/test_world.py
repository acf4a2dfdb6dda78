import itertools

import numpy as np
import pytest

from diffalign.shapes import captions, world
from diffalign.shapes.world import BACKGROUND, PALETTE, SHAPES, Object, coverage, render


def lab(colour):
    """sRGB to CIELAB (D65)."""
    c = np.array(colour) / 255
    c = np.where(c > 0.04045, ((c + 0.055) / 1.055) ** 2.4, c / 12.92)
    m = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    v = m @ c / np.array([0.9505, 1, 1.089])
    f = np.where(v > 0.008856, np.cbrt(v), 7.787 * v + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_palette_colours_are_far_apart():
    colours = [*PALETTE.values(), BACKGROUND]
    assert min(np.linalg.norm(lab(a) - lab(b)) for a, b in itertools.combinations(colours, 2)) > 25


AREA = {"circle": np.pi, "square": (2 * 0.88) ** 2, "triangle": 1.1 * 1.9, "star": 5 * 1.2 * 0.54 * np.sin(np.pi / 5)}


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_has_the_shapes_area_centre_and_box(shape):
    radius, centres = 40.0, np.arange(128) + 0.5
    cover = coverage(shape, 64.0, 60.0, radius, centres[None], centres[:, None])
    assert cover.sum() == pytest.approx(AREA[shape] * radius**2, rel=0.01)
    y = (cover * centres[:, None]).sum() / cover.sum()
    x = (cover * centres[None]).sum() / cover.sum()
    assert (x, y) == pytest.approx((64.0, 60.0 + radius * world.CENTROID[shape]), abs=0.15)
    rows, cols = np.flatnonzero(cover.max(1) > 0.5), np.flatnonzero(cover.max(0) > 0.5)
    box = Object(shape, "red", 64, 60, radius).box
    assert (cols[0], rows[0], cols[-1] + 1, rows[-1] + 1) == pytest.approx(box, abs=2.0)


def test_render_draws_colour_on_background():
    image = render((Object("square", "blue", 32, 32, 10),))
    assert image.shape == (64, 64, 3)
    assert image.dtype == np.uint8
    assert tuple(image[32, 32]) == PALETTE["blue"]
    assert tuple(image[2, 2]) == BACKGROUND


@pytest.mark.parametrize("task", captions.TASKS)
def test_scenes_are_inside_the_canvas_and_apart(task):
    rng = np.random.default_rng(3)
    for combination in captions.combinations(task)[::7]:
        scene = captions.scene(combination, rng)
        assert len(scene) == combination.count * len(combination.things)
        assert all(0.9 <= edge <= 63.1 for item in scene for edge in item.box)
        gap = -1.0 if task == "position" else world.GAP  # exchanged places may touch
        assert all(world.apart(a, b, gap) for a, b in itertools.combinations(scene, 2))
