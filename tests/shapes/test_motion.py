"""The moving world: its videos satisfy their captions, its judge refuses others."""

import numpy as np
import pytest

from diffalign.shapes import motion
from diffalign.shapes.world import BACKGROUND, Object, render

RED = motion.Combination("circle", "red", "moving left")


def film(*places, shape="circle", colour="red"):
    return np.stack([render((Object(shape, colour, x, y, 5.0),), motion.SIZE) for x, y in places])


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_every_video_is_what_its_caption_says(split):
    rng = np.random.default_rng(0)
    for combination in motion.split(split) * 3:
        video, wanted = motion.video(combination, rng), motion.caption(combination)
        verdict = motion.official(video, wanted)
        assert verdict.correct, (wanted["prompt"], verdict.reason)
        assert motion.partial(video, wanted) == pytest.approx(1)


def test_a_video_of_another_caption_fails():
    rng, wrong = np.random.default_rng(1), 0
    everything = motion.split("train")
    for combination in everything:
        other = everything[rng.integers(len(everything))]
        same = combination.shape == other.shape and combination.motion == other.motion
        if same and (combination.colour is None or combination.colour == other.colour):
            continue
        verdict = motion.official(motion.video(other, rng), motion.caption(combination))
        wrong += verdict.correct
        assert motion.partial(motion.video(other, rng), motion.caption(combination)) < 1
    assert wrong == 0


def test_splits_share_no_combination_and_cover_all():
    parts = [set(motion.split(name)) for name in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [80, 20, 40]
    assert len(set.union(*parts)) == 140
    with pytest.raises(ValueError, match="split: got 'all'"):
        motion.split("all")


@pytest.mark.parametrize(
    ("places", "reason"),
    [
        ([(24, 16), (21, 16), (18, 16), (15, 16), (12, 16)], ""),
        ([(12, 16), (15, 16), (18, 16), (21, 16), (24, 16)], "not moving left"),  # the other way
        ([(24, 16), (21, 16), (22, 16), (15, 16), (12, 16)], "not moving left"),  # a step back
        ([(20, 16), (19, 16), (18, 16), (17, 16), (16, 16)], "not moving left"),  # not far enough
        ([(24, 10), (21, 12), (18, 14), (15, 16), (12, 18)], "not moving left"),  # as much downwards
        ([(24, 16)] * 5, "not moving left"),
    ],
)
def test_the_way_is_judged(places, reason):
    assert motion.official(film(*places), motion.caption(RED)).reason == reason


def test_partial_credit_is_half_for_what_is_shown_and_half_for_the_way():
    wanted = motion.caption(RED)
    still = motion.caption(motion.Combination("circle", "red", "standing still"))
    way = film((24, 16), (21, 16), (18, 16), (15, 16), (12, 16))
    assert motion.partial(way, wanted) == pytest.approx(1)
    assert motion.partial(way[::-1], wanted) == pytest.approx(0.5)
    assert motion.partial(film(*[(16, 16)] * 5), still) == pytest.approx(1)
    half = film((20, 16), (19.375, 16), (18.75, 16), (18.125, 16), (17.5, 16))  # 2.5 of the 5 pixels that are enough
    assert motion.partial(half, wanted) == pytest.approx(0.75, abs=0.02)  # the centre of whole pixels
    other = film((24, 16), (21, 16), (18, 16), (15, 16), (12, 16), shape="square", colour="blue")
    assert motion.partial(other, wanted) == pytest.approx(0.5)
    empty = np.full((5, 32, 32, 3), BACKGROUND, np.uint8)
    assert motion.partial(empty, wanted) == 0
    assert motion.partial(empty, still) == 0
    assert "frame 0" in motion.official(empty, wanted).reason
