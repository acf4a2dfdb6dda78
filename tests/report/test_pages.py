"""Pages on the one base."""

import re

import pytest

from diffalign.evaluation import report
from diffalign.report import pages
from diffalign.sampling import pictures
from tests.kit import ROOT

TEMPLATES = sorted((ROOT / "diffalign").rglob("page.html"))


def test_a_page_has_the_bases_styles_and_its_text_is_escaped(tmp_path):
    (tmp_path / "page.html").write_text(
        '{% extends "base.html" %}{% block body %}<p>{{ text | twice }}</p>{% endblock %}'
    )
    made = pages.render(tmp_path / "page.html", {"twice": lambda text: text * 2}, text="<b>")
    assert "<p>&lt;b&gt;&lt;b&gt;</p>" in made
    assert "prefers-color-scheme: dark" in made
    assert '<meta name="viewport"' in made


@pytest.mark.parametrize("template", [*TEMPLATES, pages.BASE], ids=lambda path: path.parent.name)
def test_no_page_asks_for_anything_from_elsewhere(template):
    text = template.read_text()
    assert not re.search(r"https?:|@import|<link|url\(", text.replace("http://www.w3.org/2000/svg", ""))
    assert template == pages.BASE or text.startswith('{% extends "base.html" %}')


def test_every_page_is_one_of_these():
    assert {report.PAGE, pictures.PAGE} <= set(TEMPLATES)
