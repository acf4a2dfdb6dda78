import itertools

import pytest

from diffalign.shapes import captions
from diffalign.shapes.captions import SPLITS, TASKS, Combination, caption

SIZES = {"single_object": 4, "two_object": 6, "counting": 84, "colors": 24, "position": 744, "color_attr": 180}


@pytest.mark.parametrize("task", TASKS)
def test_splits_cover_the_task_and_share_no_combination_and_no_caption(task):
    parts = [captions.split(task, name) for name in SPLITS]
    assert sorted(map(str, itertools.chain(*parts))) == sorted(map(str, captions.combinations(task)))
    assert len(captions.combinations(task)) == SIZES[task]
    assert all(parts)
    texts = [{m["prompt"] for m in captions.captions(task, name)} for name in SPLITS]
    assert not any(a & b for a, b in itertools.combinations(texts, 2))


def test_at_least_24_counting_combinations_are_held_out():
    assert len(captions.split("counting", "test")) >= 24


def test_templates_and_metadata_are_genevals():
    two = caption(Combination("two_object", (("circle", None), ("star", None))))
    assert two == {
        "tag": "two_object",
        "include": [{"class": "circle", "count": 1}, {"class": "star", "count": 1}],
        "prompt": "a photo of a circle and a star",
    }
    counting = caption(Combination("counting", (("star", "orange"),), count=3))
    assert counting == {
        "tag": "counting",
        "include": [{"class": "star", "count": 3, "color": "orange"}],
        "exclude": [{"class": "star", "count": 4}],
        "prompt": "a photo of three orange stars",
    }
    assert caption(Combination("colors", (("square", "orange"),)))["prompt"] == "a photo of an orange square"


def test_both_wordings_of_a_relation_are_one_combination():
    one = Combination("position", (("circle", "red"), ("square", "blue")), relation="left of")
    assert caption(one)["prompt"] == "a photo of a red circle left of a blue square"
    assert caption(one)["include"] == [
        {"class": "square", "count": 1, "color": "blue"},
        {"class": "circle", "count": 1, "color": "red", "position": ["left of", 0]},
    ]
    assert caption(one, flip=True)["prompt"] == "a photo of a blue square right of a red circle"
    assert caption(one, flip=True)["include"][1]["position"] == ["right of", 0]


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="allowed are"):
        captions.split("counting", "held-out")
    with pytest.raises(ValueError, match="allowed are"):
        captions.combinations("spelling")
