"""The exact judge: agreement with the truth, and counter-examples that must fail, each for its reason."""

import numpy as np
import pytest
from scipy import ndimage

from diffalign.ops import geneval
from diffalign.shapes import captions
from diffalign.shapes.detector import detect
from diffalign.shapes.world import BACKGROUND, COLOURS, PALETTE, SHAPES, Object, render

Y, X = np.mgrid[:64, :64] + 0.5
RED_CIRCLE = captions.caption(captions.Combination("colors", (("circle", "red"),)))


def agreement(task, spoil=lambda image, rng: image, count=100):
    rng = np.random.default_rng([1, captions.TASKS.index(task)])
    options, right = captions.combinations(task), 0
    for k in range(count):
        combination = options[rng.integers(len(options))]
        image = spoil(render(captions.scene(combination, rng)), rng)
        found = detect(image)
        wanted = captions.caption(combination, bool(k % 2))
        right += geneval.strict(found.objects, wanted, found.residue).correct
        assert (
            geneval.official(found.objects, wanted).correct
            or not geneval.strict(found.objects, wanted, found.residue).correct
        )
    return right / count


@pytest.mark.parametrize("task", captions.TASKS)
def test_detector_and_truth_agree_on_clean_renders(task):
    assert agreement(task) >= 0.99


def noisy(image, rng):
    return np.clip(np.round(image + rng.normal(0, 8, image.shape)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("task", captions.TASKS)
def test_detector_and_truth_agree_under_noise_of_8(task):
    assert agreement(task, noisy) >= 0.99


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("colour", COLOURS)
def test_every_shape_colour_and_size_alone(shape, colour):
    for radius in (7.0, 8.3, 10.0, 13.0):
        for x, y in ((20.0, 31.5), (33.3, 40.7)):
            item = Object(shape, colour, x, y, radius)
            found = detect(render((item,)))
            assert [(d.name, d.colour) for d in found.objects] == [(shape, colour)]
            assert found.objects[0].box == pytest.approx(item.box, abs=1.5)
            assert found.residue == 0


def paint(cover, colour="red"):
    cover = np.clip(cover, 0, 1)[..., None]
    return np.round((1 - cover) * np.array(BACKGROUND) + cover * np.array(PALETTE[colour])).astype(np.uint8)


def blobs(seed):
    field = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(64, 64, 6)), (5, 5, 0))
    return np.array([PALETTE[c] for c in COLOURS], np.uint8)[field.argmax(-1)]


circle, square = Object("circle", "red", 24, 32, 10), Object("square", "blue", 34, 32, 10)
COUNTER_EXAMPLES = {
    "wrong colour": (render((Object("circle", "blue", 32, 32, 10),)), "expected red circle, found blue"),
    "wrong shape": (render((Object("star", "red", 32, 32, 10),)), "expected 1 circle, found 0"),
    "one too many": (render((circle, Object("circle", "red", 48, 32, 10))), "expected 1 objects in all, found 2"),
    "overlap": (render((circle, square)), "expected 1 circle, found 0"),
    "same colour overlap": (render((circle, Object("circle", "red", 36, 32, 10))), "expected 1 circle, found 0"),
    "cropped": (render((Object("circle", "red", 4, 32, 10),)), "expected 1 circle, found 0"),
    "turned square": (paint(0.5 - ((abs(X - 32) + abs(Y - 32)) - 13) / 2**0.5), "expected 1 circle, found 0"),
    "ring": (paint(0.5 - np.maximum(np.hypot(X - 32, Y - 32) - 12, 5 - np.hypot(X - 32, Y - 32))), "found 0"),
    "blobs": (blobs(0), "expected 1 objects in all, found 4"),
    "blank": (render(()), "expected 1 circle, found 0"),
    "uniform noise": (np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8), "found 0"),
    "checkerboard": (paint(((X // 8 + Y // 8) % 2).astype(float)), "expected 1 circle, found 0"),
    "smear": (
        np.minimum(render((circle,)), paint(((abs(X - 50) < 2) & (abs(Y - 40) < 7)).astype(float), "green")),
        "unexplained pixels",
    ),
}


@pytest.mark.parametrize("name", COUNTER_EXAMPLES)
def test_counter_examples_fail_for_their_reason(name):
    image, reason = COUNTER_EXAMPLES[name]
    found = detect(image)
    verdict = geneval.strict(found.objects, RED_CIRCLE, found.residue)
    assert not verdict.correct
    assert reason in verdict.reason


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cropped", "edge"),
        ("ring", "hole"),
        ("turned square", "no shape fits"),
        ("same colour overlap", "no shape fits"),
    ],
)
def test_rejected_components_say_why(name, reason):
    rejected = detect(COUNTER_EXAMPLES[name][0]).rejected
    assert len(rejected) == 1
    assert reason in rejected[0].reason


def test_colour_blobs_fool_the_official_verdict_at_times_and_the_residue_never():
    fooled = 0
    for seed in range(60):
        found = detect(blobs(seed))
        fooled += bool(found.objects)
        assert found.residue > 0.5
    assert fooled > 0  # this is why the strict verdict looks at the residue


def test_wrong_relation_and_count_are_refused():
    left = (Object("circle", "red", 16, 32, 8), Object("square", "blue", 48, 32, 8))
    for relation, holds in (("left of", True), ("right of", False), ("above", False)):
        wanted = captions.caption(
            captions.Combination("position", (("circle", "red"), ("square", "blue")), relation=relation)
        )
        verdict = geneval.official(detect(render(left)).objects, wanted)
        assert verdict.correct == holds
        assert holds or verdict.reason == f"circle is not {relation} square"


def test_mirroring_picture_and_caption_keeps_the_verdict():
    rng = np.random.default_rng(5)
    mirror = {"left of": "right of", "right of": "left of"}
    for combination in captions.combinations("position")[::25]:
        image = render(captions.scene(combination, rng))
        flipped = captions.Combination(
            "position", combination.things, relation=mirror.get(str(combination.relation), combination.relation)
        )
        found = detect(np.ascontiguousarray(image[:, ::-1]))
        assert geneval.strict(found.objects, captions.caption(flipped), found.residue).correct


@pytest.mark.parametrize(
    "image", [np.zeros((64, 64), np.uint8), np.zeros((64, 64, 3)), np.zeros((64, 64, 4), np.uint8)]
)
def test_other_arrays_are_refused(image):
    with pytest.raises(ValueError, match="expected"):
        detect(image)
