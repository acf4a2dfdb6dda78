"""Pages on the one base."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from diffalign.evaluation import page as evaluated
from diffalign.report import pages
from diffalign.report import pictures as of_pictures
from diffalign.runs.watching import gallery
from diffalign.runs.watching import page as run
from diffalign.sampling import pictures
from tests.kit import ROOT

TEMPLATES = sorted(path for path in (ROOT / "diffalign").rglob("*.html") if path != pages.BASE)


def test_a_page_has_the_bases_styles_and_its_text_is_escaped(tmp_path):
    (tmp_path / "page.html").write_text(
        '{% extends "base.html" %}{% block body %}<p>{{ text | twice }}</p>{% endblock %}'
    )
    made = pages.render(tmp_path / "page.html", {"twice": lambda text: text * 2}, text="<b>")
    assert "<p>&lt;b&gt;&lt;b&gt;</p>" in made
    assert "prefers-color-scheme: dark" in made
    assert '<meta name="viewport"' in made


@pytest.mark.parametrize("template", [*TEMPLATES, *pages.SHARED], ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_page_asks_for_anything_from_elsewhere(template):
    text = template.read_text()
    assert not re.search(r"https?:|@import|<link|url\(", text.replace("http://www.w3.org/2000/svg", ""))
    assert template in pages.SHARED or text.startswith('{% extends "base.html" %}')


def test_every_page_is_one_of_these():
    assert {evaluated.PAGE, pictures.PAGE, run.PAGE, gallery.LIST} <= set(TEMPLATES)


@pytest.mark.parametrize(
    ("size", "kind", "kept"), [(64, "png", 64), (160, "png", 160), (161, "jpeg", 161), (1024, "jpeg", 320)]
)
def test_small_pictures_are_embedded_as_they_are_and_photographs_smaller(size, kind, kept):
    """The base's style shows embedded PNGs pixel by pixel, and nothing else."""
    pixels = np.random.default_rng(0).integers(0, 255, (size, size, 3), np.uint8)
    head, _, data = of_pictures.address(pixels).partition(",")
    assert head == f"data:image/{kind};base64"
    back = Image.open(io.BytesIO(base64.b64decode(data)))
    assert back.size == (kept, kept)
    assert of_pictures.small(pixels.shape) == (kind == "png")
    assert kind != "png" or np.array_equal(np.asarray(back), pixels)
