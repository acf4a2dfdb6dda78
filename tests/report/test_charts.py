"""Charts as SVG: where points lie, what they say, that they are well-formed."""

import math
from xml.etree import ElementTree

import pytest

from diffalign.report import charts
from diffalign.report.charts import Bar, Line

SVG = "{http://www.w3.org/2000/svg}"


def drawn(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def test_points_lie_where_their_numbers_are_and_say_them():
    line = Line("a <b>", [0, 10, 20], [0.0, 1.0, 0.5], [0.0, 0.8, 0.5], [0.1, 1.2, 0.5], ["x", "y", "z & w"], 1)
    root = drawn(charts.lines([line], 'a "title"', "updates"))
    assert root.get("aria-label") == 'a "title"'
    points = [group for group in root.iter(f"{SVG}g") if group.get("class") == "point"]
    assert [group.find(f"{SVG}title").text for group in points] == ["a <b>: x", "a <b>: y", "a <b>: z & w"]
    places = [tuple(float(group.find(f"{SVG}circle").get(axis)) for axis in ("cx", "cy")) for group in points]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)  # places are rounded to a tenth of a pixel
    assert y0 - y2 == pytest.approx(y2 - y1, abs=0.2)
    assert x0 < x1
    assert y1 < y2 < y0, "up is more"
    ticks = {text.text for text in root.iter(f"{SVG}text")}
    assert {"0", "20", "updates"} <= ticks
    assert {"2.5", "0.5"} & ticks == {"0.5"}, "whole numbers have whole ticks"


def test_one_point_and_equal_values_are_drawn():
    for root in (
        drawn(charts.lines([Line("a", [5], [0.3], [0.3], [0.3], ["n"])], "t", "x")),
        drawn(charts.forest([Bar("a - b", 0.0, None, None)], "t", "x")),
    ):
        dots = list(root.iter(f"{SVG}circle"))
        assert dots
        assert all(math.isfinite(float(dot.get(axis))) for dot in dots for axis in ("cx", "cy"))


def test_an_interval_is_drawn_from_end_to_end_beside_nothing():
    root = drawn(charts.forest([Bar("a - b", 0.1, -0.1, 0.3, strong=True), Bar("a - c", 0.2, None, None)], "t", "x"))
    zero, interval = root.findall(f".//{SVG}line")
    dots = [float(dot.get("cx")) for dot in root.iter(f"{SVG}circle")]
    ends = [float(interval.get(end)) for end in ("x1", "x2")]
    assert ends[0] < float(zero.get("x1")) < dots[0] < dots[1] < ends[1]
    assert dots[0] == pytest.approx(sum(ends) / 2, abs=0.2)


def test_a_faint_line_has_no_points_and_one_point_shows_its_interval():
    faint = Line("a", [0, 1, 2], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [], 1, True)
    root = drawn(charts.lines([faint, Line("a", [0], [0.5], [0.25], [0.75], ["n"])], "t", "x"))
    assert len(list(root.iter(f"{SVG}g"))) == 2, "the whole, and one point"
    (band,) = root.iter(f"{SVG}polygon")
    (x, high), (_, low) = (map(float, part.split(",")) for part in band.get("points").split())
    (place,) = {(float(dot.get("cx")), float(dot.get("cy"))) for dot in root.iter(f"{SVG}circle")}
    assert x == place[0] and high < place[1] < low and band.get("stroke-width") == "2"


def test_one_value_has_one_tick_and_a_forest_may_have_no_zero():
    root = drawn(charts.lines([Line("a", [0], [0.5], [0.5], [0.5], ["n"])], "t", "updates"))
    assert sorted(text.text for text in root.iter(f"{SVG}text")) == ["0", "0.5", "updates"]
    root = drawn(charts.forest([Bar("a", 0.5, 0.4, 0.6)], "t", "x", nothing=None))
    assert "0" not in {text.text for text in root.iter(f"{SVG}text")}
    assert len(root.findall(f".//{SVG}line")) == 1


def test_a_spark_rises_with_its_values():
    way = drawn(charts.spark([1.0, 2.0, 4.0])).find(f"{SVG}polyline").get("points").split()
    ups = [float(point.split(",")[1]) for point in way]
    assert ups[0] - ups[1] == pytest.approx((ups[1] - ups[2]) / 2, abs=0.2)  # places are rounded to a tenth of a pixel
    assert charts.spark([1.0]) == ""
