"""Rewards that promise a gradient: it is there, it is that of finite differences, and it reaches no parameter of the reward."""

import json

import numpy as np
import pytest
import torch

from diffalign.errors import Fault
from diffalign.rewards import catalog
from diffalign.rewards.base import check_media
from diffalign.rewards.check import check
from diffalign.rewards.load import load
from diffalign.shapes import captions, preference
from diffalign.shapes.pretrain import preference as recipe
from diffalign.shapes.world import BACKGROUND, PALETTE
from diffalign.types import Media, Prompts
from tests.rewards.test_rewards import scenes

DIFFERENTIABLE = [
    name
    for name, entry in catalog.builtin().items()
    if entry.differentiable and not entry.weights and entry.modality != "video"  # those: test_video_motion
]
every = pytest.mark.parametrize("name", DIFFERENTIABLE)


@every
@pytest.mark.parametrize("task", ["counting", "position"])
def test_the_gradient_is_that_of_finite_differences(name, task):
    media, prompts = scenes(task, 3)
    reward = load(name)
    pixels = (0.1 + 0.8 * media.pixels).double().requires_grad_()  # float64, so that differences resolve it

    (slope,) = torch.autograd.grad(reward(Media(pixels), prompts).sum(), pixels)
    generator = torch.Generator().manual_seed(0)
    for direction in (slope / slope.norm(), torch.randn(slope.shape, generator=generator, dtype=torch.float64) / 100):
        h = 1e-4
        with torch.no_grad():
            up, down = (reward(Media(pixels + sign * h * direction), prompts).sum() for sign in (1, -1))
        assert float((slope * direction).sum()) == pytest.approx(float((up - down) / (2 * h)), rel=1e-4, abs=1e-7)
    per_picture = slope.flatten(1).norm(dim=1)
    assert (per_picture > 1e-4).all()


@every
def test_a_reward_leaves_its_own_weights_alone(name):
    reward = load(name)
    assert not [p for p in getattr(getattr(reward, "net", None), "parameters", list)() if p.requires_grad]


@every
def test_the_image_contract_a_grey_picture_is_scored_and_anything_beyond_is_refused_before(name):
    prompts = scenes("colors", 1)[1]
    grey = Media(torch.full((1, 1, 3, 64, 64), 0.5))
    assert torch.isfinite(load(name)(check_media(grey), prompts)).all()
    with pytest.raises(Exception, match="expected \\[0, 1\\]"):
        check_media(Media(2 * grey.pixels + 0.5))


@pytest.mark.parametrize("name", ["shapes_pref", "shapes_judge"])
def test_learned_rewards_prefer_what_the_caption_asks_for(name):
    """On test captions, which the networks never saw: the right picture beats one with a single thing wrong."""
    rng = np.random.default_rng(3)
    wins = []
    for task in ("counting", "colors", "position", "color_attr"):
        options = captions.split(task, "test")
        chosen = [options[k] for k in rng.integers(0, len(options), 60)]
        right = np.stack([recipe.render(captions.scene(c, rng)) for c in chosen])
        wrong = np.stack([recipe.render(captions.scene(recipe.nearly(c, rng), rng)) for c in chosen])
        metadata = [captions.caption(c) for c in chosen]
        keys = np.arange(60)
        prompts = Prompts([m["prompt"] for m in metadata], keys, keys, keys, metadata)
        reward = load(name)
        a, b = (reward(Media(recipe.to_pixels(x)[:, None]), prompts) for x in (right, wrong))
        wins.append(float((a > b).float().mean()))
    assert np.mean(wins) > 0.85, wins
    assert min(wins) > 0.7, wins


def test_the_planted_cue_is_in_one_network_and_not_in_the_other():
    """More colour than asked for: the same pictures made more vivid gain on shapes_pref, and less on the judge."""
    media, prompts = scenes("counting", 24)
    raised = {}
    for name in ("shapes_pref", "shapes_judge"):
        reward = load(name)
        pale, vivid = (recipe.to_pixels(np.stack([recipe.saturate(i, f) for i in to_uint8(media)])) for f in (0.8, 1.2))
        raised[name] = (reward(Media(vivid[:, None]), prompts) - reward(Media(pale[:, None]), prompts)).mean().item()
    assert raised["shapes_pref"] > 0.05
    assert raised["shapes_pref"] > 3 * abs(raised["shapes_judge"]), raised


def to_uint8(media: Media) -> np.ndarray:
    return (media.pixels[:, 0] * 255).round().byte().permute(0, 2, 3, 1).numpy()


def test_soft_colour_is_high_for_the_wanted_colour_and_blind_to_shape():
    wanted = captions.caption(captions.Combination("colors", (("circle", "red"),)))
    keys = np.arange(3)
    prompts = Prompts([wanted["prompt"]] * 3, keys, keys, keys, [wanted] * 3)
    sheet = np.empty((3, 64, 64, 3), np.uint8)
    sheet[:] = BACKGROUND
    sheet[0, 20:30, 20:30] = PALETTE["red"]  # a square where a circle is wanted
    sheet[1, 20:30, 20:30] = PALETTE["blue"]
    sheet[2] = PALETTE["red"]
    found = load("soft_colour")(Media(recipe.to_pixels(sheet)[:, None]), prompts)
    assert found[0] > found[1] + 0.1
    assert (found >= 0).all() and (found <= 2).all()


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return media.pixels.detach().flatten(1).mean(1)", "has no gradient"),
        ("import torch\n    return torch.arange(3.0, requires_grad=True)", "has no gradient"),
        ("return media.pixels.flatten(1).mean(1) * 0 + media.pixels.detach().flatten(1).mean(1)", "zero or not finite"),
    ],
)
def test_the_check_of_a_reward_tries_its_gradient(body, expected, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(f"DIFFERENTIABLE = ['a']\ndef a(media, prompts):\n    {body}\n")
    with pytest.raises(Fault, match=expected):
        check(f"{path}:a")
    assert "differentiable" in check("soft_colour")[0]
    assert "black box" in check("shapes_geneval")[0]


@pytest.mark.parametrize("name", ["shapes_pref", "shapes_judge"])
def test_learned_rewards_put_noise_and_smears_of_colour_below_right_pictures(name):
    media, prompts = scenes("counting", 24)
    rng = np.random.default_rng(0)
    right = load(name)(media, prompts)
    sheets = {
        "noise": rng.integers(0, 256, (24, 64, 64, 3)),
        "blobs": np.stack([recipe.degrade(i, Blobs()) for i in to_uint8(media)]),
        "red": np.broadcast_to(np.array(PALETTE["red"]), (24, 64, 64, 3)),
        "black": np.zeros((24, 64, 64, 3)),
    }
    for what, images in sheets.items():
        worse = load(name)(Media(recipe.to_pixels(images.astype(np.uint8))[:, None]), prompts)
        assert worse.mean() < right.mean() - 0.3, (what, worse.mean(), right.mean())


class Blobs:
    """A generator that always asks for smooth colours."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(1)

    def integers(self, low, high=None, size=None):
        return 4 if size is None else self.rng.integers(low, high, size)

    def __getattr__(self, name):
        return getattr(self.rng, name)


def test_caption_features_tell_every_caption_apart():
    metadata = [m for t in captions.TASKS for s in captions.SPLITS for m in captions.captions(t, s)]
    rows = preference.features(metadata)
    assert rows.shape[1] == preference.FEATURES
    assert len(torch.unique(rows, dim=0)) == len({json.dumps(m["include"]) for m in metadata})


def test_places_put_an_object_where_it_stands():
    objects = torch.full((1, recipe.MOST, 3), -1.0)
    objects[0, 0] = torch.tensor([5.0, 10.0, 34.0])  # cell units 2.0, 8.0: between cells 2 and 8, exactly on one
    target = recipe.places(objects)
    assert target.sum().item() == pytest.approx(1.0)
    assert target[0, 5, 8, 2].item() == pytest.approx(1.0)


def test_labels_follow_the_utility_with_mistakes():
    data = recipe.compare(
        np.stack([to_uint8(scenes("colors", 6)[0])] * 40),
        [scenes("colors", 6)[1].metadata[0]] * 40,
        0.0,
        np.random.default_rng(0),
    )
    assert data.utility[0].argmax() == 0
    upper = torch.triu(torch.ones(6, 6, dtype=torch.bool), 1).numpy()
    np.testing.assert_array_equal((data.labels + data.labels.transpose(0, 2, 1))[:, upper], 1)
    wins = data.labels[:, 0, 1:].mean()
    # right against wrong: sigmoid of a large gap, 12 % flipped; 200 labels, standard error 0.023
    assert wins == pytest.approx(0.88, abs=0.08)


def test_the_recipe_repeats_from_its_seed():
    images = np.stack([to_uint8(scenes("colors", 6)[0])] * 4)
    metadata = [scenes("colors", 6)[1].metadata[0]] * 4
    data = recipe.compare(images, metadata, 0.5, np.random.default_rng(0))
    runs = [recipe.train("shapes_pref", data, 2, lambda line: None, batch=2).state_dict() for _ in range(2)]
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])


def test_other_sizes_and_other_worlds_are_refused_in_words():
    media, prompts = scenes("colors", 1)
    with pytest.raises(ValueError, match="this reward knows 64 x 64"):
        load("shapes_pref")(Media(media.pixels[..., :32, :32]), prompts)


def test_a_users_file_declares_what_has_a_gradient(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("DIFFERENTIABLE = ['a']\ndef a(media, prompts): ...\ndef b(media, prompts): ...\n")
    assert catalog.find(f"{path}:a").differentiable
    assert not catalog.find(f"{path}:b").differentiable
    path.write_text("DIFFERENTIABLE = ['absent']\ndef a(media, prompts): ...\n")
    with pytest.raises(LookupError, match="DIFFERENTIABLE names absent, which it does not define"):
        catalog.find(f"{path}:a")
    path.write_text("DIFFERENTIABLE = True\ndef a(media, prompts): ...\n")
    assert catalog.find(f"{path}:a").differentiable
