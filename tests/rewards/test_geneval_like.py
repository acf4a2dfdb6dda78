"""GenEval's verdict around a detector that transformers has: its output read right, colours, thresholds."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor, SwinConfig

from diffalign.errors import UserError
from diffalign.rewards.load import load
from diffalign.types import Media, Prompts
from reward_models import geneval_like
from tests.rewards.test_clip import folder as clip_folder

folder = clip_folder
LABELS = {0: "dog", 1: "mouse", 2: "car"}


@pytest.fixture(scope="module")
def place(folder, tmp_path_factory):
    """Tiny random models laid out as `geneval_like@PLACE` wants them."""
    made = tmp_path_factory.mktemp("geneval")
    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=32,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=5,
        id2label=LABELS,
        label2id={v: k for k, v in LABELS.items()},
    )
    Mask2FormerForUniversalSegmentation(config).save_pretrained(made / "mask2former")
    Mask2FormerImageProcessor(size={"height": 128, "width": 128}).save_pretrained(made / "mask2former")
    (made / "clip").symlink_to(folder)
    return made


@pytest.fixture(scope="module")
def reward(place):
    return load(f"geneval_like@{place}")


def wanted(tag, *include, **more):
    return {"tag": tag, "include": list(include), **more}


def planted(reward, monkeypatch, *found):
    """A detector that finds what it is told: (class, confidence, box)."""

    def masks(picture, device):
        made = []
        for name, score, (left, top, right, bottom) in found:
            mask = np.zeros(picture.shape[:2], bool)
            mask[top:bottom, left:right] = True
            made.append((name, score, mask))
        return made

    monkeypatch.setattr(reward.reward, "masks", masks)


def scored(reward, metadata, pixels=None):
    pixels = torch.rand(1, 1, 3, 32, 32) if pixels is None else pixels
    keys = np.arange(1)
    return reward(Media(pixels), Prompts(["a"], keys, keys, keys, [metadata]))[0]


def test_the_real_classes_run_on_pictures(reward):
    pixels = torch.rand(2, 1, 3, 40, 24, generator=torch.Generator().manual_seed(0))
    keys = np.arange(2)
    metadata = [wanted("single_object", {"class": "dog", "count": 1})] * 2
    assert set(reward(Media(pixels), Prompts(["a", "b"], keys, keys, keys, metadata))) <= {0.0, 1.0}


def test_the_detector_s_output_is_read_as_classes_scores_and_masks_of_the_picture_s_size(reward, monkeypatch):
    """Two queries with planted logits: a mouse on the left half, and nothing."""
    class_logits = torch.full((1, 2, 4), -9.0)
    class_logits[0, 0, 1], class_logits[0, 1, 3] = 9.0, 9.0  # the last class is "no object"
    mask_logits = torch.full((1, 2, 8, 8), -9.0)
    mask_logits[0, 0, :, :4] = 9.0
    out = SimpleNamespace(class_queries_logits=class_logits, masks_queries_logits=mask_logits)

    class Detector:
        config = SimpleNamespace(id2label=LABELS)

        def to(self, device):
            return lambda **given: out

    monkeypatch.setattr(reward.reward, "detector", Detector())
    picture = np.zeros((40, 60, 3), np.uint8)
    ((name, score, mask),) = reward.reward.masks(picture, torch.device("cpu"))
    assert name == "computer mouse"  # as GenEval calls it
    assert score > 0.95
    assert mask.shape == (40, 60)
    assert geneval_like.box(mask) == pytest.approx((0, 0, 30, 40), abs=1)


def test_detections_count_above_their_thresholds(reward, monkeypatch):
    dog = {"class": "dog", "count": 1}
    for score, single, counted in ((0.3, 0, 0), (0.31, 1, 0), (0.9, 1, 0), (0.91, 1, 1)):
        planted(reward, monkeypatch, ("dog", score, (2, 2, 10, 10)))
        assert scored(reward, wanted("single_object", dog)) == single
        assert scored(reward, wanted("counting", dog, exclude=[{"class": "dog", "count": 2}])) == counted


def test_more_than_asked_fails_only_where_objects_are_counted(reward, monkeypatch):
    planted(reward, monkeypatch, *[("dog", 0.95, (k, k, k + 5, k + 5)) for k in (1, 8, 15)])
    two = {"class": "dog", "count": 2}
    assert scored(reward, wanted("counting", two, exclude=[{"class": "dog", "count": 3}])) == 0
    assert scored(reward, wanted("two_object", two)) == 1


def test_positions_are_those_of_the_masks_boxes(reward, monkeypatch):
    planted(reward, monkeypatch, ("dog", 0.8, (1, 10, 8, 20)), ("car", 0.8, (20, 10, 30, 20)))
    car, left, right = {"class": "car", "count": 1}, ["left of", 0], ["right of", 0]
    assert scored(reward, wanted("position", car, {"class": "dog", "count": 1, "position": left})) == 1
    assert scored(reward, wanted("position", car, {"class": "dog", "count": 1, "position": right})) == 0


def test_an_object_is_shown_to_clip_alone_on_grey(reward, monkeypatch):
    """A CLIP that knows red from the rest by the mean of its picture's first channel."""
    seen = []

    class Clip:
        def text(self, texts):
            seen.append(texts)
            return torch.tensor([[1.0, 0.0] if " red" in t else [0.0, 1.0] for t in texts])

        def image(self, pixels):
            seen.append(pixels)
            return (
                torch.tensor([[1.0, 0.0]]) if pixels[0, 0].mean() > pixels[0, 2].mean() else torch.tensor([[0.0, 1.0]])
            )

    monkeypatch.setattr(reward.reward, "clip", Clip())
    planted(reward, monkeypatch, ("car", 0.8, (4, 6, 12, 10)))
    pixels = torch.zeros(1, 1, 3, 32, 32)
    pixels[..., 2, :, :] = 1.0  # all blue, and the car red
    pixels[0, 0, 0, 6:10, 4:12], pixels[0, 0, 2, 6:10, 4:12] = 1.0, 0.0
    red, blue = ({"class": "car", "count": 1, "color": colour} for colour in ("red", "blue"))
    assert scored(reward, wanted("colors", red), pixels) == 1
    assert scored(reward, wanted("colors", blue), pixels) == 0
    assert seen[0][:3] == ["a photo of a red car", "a photo of a red-colored car", "a photo of a red object"]
    assert seen[1].shape == (1, 3, 4, 8)


def test_partial_credit_counts_what_is_there(place, monkeypatch):
    reward = load(f"geneval_like_partial@{place}")
    planted(reward, monkeypatch, ("dog", 0.8, (1, 1, 5, 5)))
    both = wanted("two_object", {"class": "dog", "count": 1}, {"class": "car", "count": 1})
    assert scored(reward, both) == 0.5


def test_a_place_without_its_parts_is_named(tmp_path):
    with pytest.raises(UserError, match="mask2former is no folder; allowed is a folder as the hub lays it out"):
        load(f"geneval_like@{tmp_path}")


def test_what_is_not_the_object_is_grey(reward, monkeypatch):
    seen = []
    monkeypatch.setattr(
        reward.reward,
        "clip",
        SimpleNamespace(text=lambda t: torch.eye(len(t)), image=lambda x: (seen.append(x), torch.ones(1, 30))[1]),
    )
    picture = np.full((8, 8, 3), 255, np.uint8)
    mask = np.zeros((8, 8), bool)
    mask[1:5, 1:3] = mask[3:5, 1:7] = True  # an L
    reward.reward.colour(picture, mask, "car", torch.device("cpu"))
    (shown,) = seen
    assert shown.shape == (1, 3, 4, 6)
    assert shown[0, :, 3, 5].tolist() == [1, 1, 1]
    assert shown[0, :, 0, 5].tolist() == pytest.approx([0x99 / 255] * 3)
