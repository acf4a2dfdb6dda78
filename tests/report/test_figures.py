"""Whatever a prompt, a name or a title holds is drawn as it is; pictures keep their size."""

import warnings

import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from diffalign.report import drawing, figures
from tests.kit.generators import COUNTS, tried

HOSTILE = [
    "$$",
    "a $x_{$ b",
    r"\frac{1}{",
    "$\\mathdefault{",
    "%s {} \\n",
    "a\nb",
    "",
    "x" * 400,
    "日本 สวัสดี 🎉 العربية",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_any_text_is_drawn(text, tmp_path):
    images = np.zeros((2, 16, 16, 3), np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures.before_after(images, images, [text, "a"], None, tmp_path / "b.png", text)
        figures.curves({text: [(1, 0.5), (2, 0.6)]}, {text: [(0, 0.5, 0.4, 0.6)]}, tmp_path / "c.png", text)
    assert Image.open(tmp_path / "b.png").size[0] < 1400


@pytest.mark.slow
@COUNTS
def test_any_letters_are_drawn(count, tmp_path):
    images = np.zeros((1, 8, 8, 3), np.uint8)
    words = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)
    tried(words, count, lambda text: figures.before_after(images, images, [text], None, tmp_path / "b.png", text))


@pytest.mark.parametrize(
    ("height", "width", "least"), [(64, 64, 128), (512, 512, 256), (64, 320, 320), (1024, 768, 256)]
)
def test_pictures_are_drawn_large_enough_whatever_the_prompts_length(height, width, least, tmp_path):
    """A white picture on a black page of prompts: its width in the file is counted."""
    images = np.full((4, height, width, 3), 200, np.uint8)
    images[..., 0] = 40
    sizes = []
    for caption in (
        "a",
        "a photo of a very long prompt that says much more than fits beneath two pictures side by side" * 3,
    ):
        figures.before_after(images, images, [caption] * 4, None, tmp_path / "b.png", "title")
        drawn = np.asarray(Image.open(tmp_path / "b.png").convert("RGB")).astype(int)
        row = (np.abs(drawn - [40, 200, 200]).sum(-1) < 12).sum(1).max()
        pairs = min(1240 // (2 * (least + 8)), 4) or 1
        sizes.append(row / (2 * pairs))
    assert sizes[0] == sizes[1]
    assert sizes[0] > 0.95 * least


def test_small_pictures_keep_their_pixels_and_large_ones_are_smoothed(tmp_path):
    def colours(size):
        board = np.indices((size, size)).sum(0) % 2 * 255
        images = np.repeat(board.astype(np.uint8)[None, :, :, None], 3, 3)
        figures.before_after(images, images, ["a"], None, tmp_path / "b.png", "")
        middle = np.asarray(Image.open(tmp_path / "b.png").convert("L"))[70:120, 40:90]
        return (middle > 30).mean() * (middle < 225).mean(), ((middle > 30) & (middle < 225)).mean()

    assert colours(32)[1] < 0.05
    assert colours(512)[1] > 0.9


def test_what_no_font_has_is_said_once():
    assert drawing.lacking(["plain", "naïve Ω"]) == ""
    said = drawing.lacking(["a \U0010fffd", "\U0010fffd\U0010fffc"])
    assert said.startswith("no installed font has 2 letters of the prompts")
