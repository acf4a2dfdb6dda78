"""Text in pictures: what is wanted, how near it is, and what is read."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from diffalign.errors import UserError
from diffalign.rewards.load import load
from diffalign.types import Media, Prompts
from reward_models import ocr


@pytest.mark.parametrize(
    ("prompt", "metadata", "wanted"),
    [
        ('a sign that says "Open Late"', {}, "openlate"),
        ('"A" beside "B"', {}, "a"),
        ("a \u201cCurly One\u201d", {}, "curlyone"),
        ('a sign that says "no"', {"text": "Yes 1"}, "yes1"),
    ],
)
def test_the_target_is_in_the_metadata_or_in_quotes(prompt, metadata, wanted):
    assert ocr.target(prompt, metadata) == wanted


@pytest.mark.parametrize(("prompt", "metadata"), [("a sign", {}), ('a ""', {}), ('"  "', {}), ("a", {"text": " "})])
def test_a_prompt_without_a_target_is_refused(prompt, metadata):
    with pytest.raises(ValueError, match="does not say what to write"):
        ocr.target(prompt, metadata)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("abc", "abc", 0), ("ab", "ba", 2), ("flaw", "lawn", 2)],
)
def test_the_distance_is_levenshteins(a, b, expected):
    assert ocr.distance(a, b) == ocr.distance(b, a) == expected


def test_credit_is_flow_grpos_and_the_exact_one_counts_what_is_too_much():
    assert ocr.credit("open", "open", exact=False) == 1
    assert ocr.credit("xxopenxx", "open", exact=False) == 1  # their rule: it is in there
    assert ocr.credit("xxopenxx", "open", exact=True) == 0
    assert ocr.credit("opem", "open", exact=True) == 0.75
    assert ocr.credit("", "open", exact=False) == 0
    assert ocr.credit("entirely another", "open", exact=False) == 0  # not below


def written(*words):
    shots = []
    for word in words:
        picture = Image.new("RGB", (256, 96), "white")
        ImageDraw.Draw(picture).text((30, 20), word, fill="black", font=ImageFont.load_default(44))
        shots.append(np.asarray(picture))
    return torch.from_numpy(np.stack(shots)).permute(0, 3, 1, 2)[:, None].float() / 255


def test_what_stands_there_is_read_without_a_network(monkeypatch):
    def none(*args, **kwargs):
        raise AssertionError("asked for a connection")

    monkeypatch.setattr("socket.socket.connect", none)
    pixels = written("STAR", "STAB", "MOON", "")
    keys = np.arange(4)
    prompts = Prompts(['says "star"'] * 4, keys, keys, keys, [{}] * 4)
    found = load("ocr")(Media(pixels), prompts)
    assert found == [1.0, 0.75, 0.0, 0.0]


def test_the_reader_gets_its_colours_in_its_own_order(monkeypatch):
    """An array is taken to be BGR, as OpenCV reads files; a picture of PIL is turned by the package itself: both must come to the same."""
    from rapidocr.utils.load_image import LoadImage

    reward = load("ocr").reward
    seen = []
    read = reward.read
    monkeypatch.setattr(reward, "read", lambda picture: (seen.append(picture), read(picture))[1])
    picture = Image.new("RGB", (256, 96), "blue")
    ImageDraw.Draw(picture).text((30, 20), "STAR", fill="red", font=ImageFont.load_default(44))
    assert reward.seen(np.asarray(picture)) == "star"
    np.testing.assert_array_equal(seen[0], LoadImage()(picture))
    assert seen[0][0, 0].tolist() == [255, 0, 0]  # of the blue ground


def test_a_reader_without_its_engine_is_refused_at_once(monkeypatch):
    """The package alone imports, and would fail at the first picture of a run."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"needs rapidocr and onnxruntime: pip install 'diffalign\[ocr\]'"):
        load("ocr")
