import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.errors import Fault, UserError
from diffalign.evaluation import score_cache as cache
from diffalign.rewards import catalog
from diffalign.rewards.base import check_media, to_uint8
from diffalign.rewards.check import check
from diffalign.rewards.load import load
from diffalign.rewards.scorer import Scorer
from diffalign.shapes import captions
from diffalign.shapes.world import render
from diffalign.types import Media, Prompts


def scenes(task="counting", count=6):
    rng = np.random.default_rng(0)
    chosen = captions.combinations(task)[:: len(captions.combinations(task)) // count][:count]
    images = np.stack([render(captions.scene(c, rng)) for c in chosen])
    metadata = [captions.caption(c) for c in chosen]
    keys = np.arange(count)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)[:, None].float() / 255
    return Media(pixels), Prompts([m["prompt"] for m in metadata], keys, keys, keys, metadata)


@pytest.mark.parametrize("name", [name for name, entry in catalog.builtin().items() if not entry.weights])
def test_every_reward_that_ships_passes_its_own_check(name):
    assert check(name)[-1] == "ok"


@pytest.mark.parametrize("name", ["shapes_geneval", "shapes_geneval_strict", "shapes_geneval_partial"])
def test_shapes_rewards_give_true_renders_full_marks_and_others_less(name):
    media, prompts = scenes()
    assert load(name)(media, prompts) == [1.0] * 6
    shifted = prompts.select([1, 2, 3, 4, 5, 0])
    assert sum(load(name)(media, shifted)) < 6


def test_jpeg_size_is_that_of_the_file_and_noise_compresses_worse():
    media, prompts = scenes(count=2)
    buffer = io.BytesIO()
    Image.fromarray(to_uint8(media)[0, 0]).save(buffer, format="JPEG", quality=95)
    sizes = load("jpeg_incompressibility")(media, prompts)
    assert sizes[0] == buffer.tell() / 1000
    assert load("jpeg_compressibility")(media, prompts) == [-size for size in sizes]
    noise = Media(torch.rand(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert min(load("jpeg_incompressibility")(noise, prompts)) > max(sizes)


def test_invariant_11_a_grey_picture_stays_grey():
    media = Media(torch.full((1, 1, 3, 8, 8), 0.5))
    assert (to_uint8(media) == 128).all()
    assert to_uint8(media).shape == (1, 1, 8, 8, 3)


@pytest.mark.parametrize(
    "pixels",
    [
        torch.full((1, 1, 3, 4, 4), -1.0),
        torch.rand(1, 3, 4, 4),
        torch.zeros(1, 1, 3, 4, 4).int(),
        torch.full((1, 1, 3, 4, 4), float("nan")),
        torch.full((1, 1, 3, 4, 4), 255.0),
    ],
)
def test_pictures_outside_the_contract_are_refused(pixels):
    with pytest.raises(Fault, match="expected|not finite"):
        check_media(Media(pixels))


def test_scores_add_up_by_weight_and_a_missing_score_is_invalid_not_a_number():
    media, prompts = scenes(count=3)
    rewards = {"a": lambda m, p: [1.0, 2.0, float("nan")], "b": lambda m, p: torch.tensor([1.0, 1.0, 1.0])}
    scores = Scorer(rewards, {"a": 2.0, "b": -1.0}).scores(media, prompts)
    assert scores.total.tolist() == [1.0, 3.0, 0.0]
    assert scores.valid.tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda m, p: [1.0], "shape"),
        (lambda m, p: 1 / 0, "ZeroDivisionError"),
        (lambda m, p: ["a", "b", "c"], "returned .*expected 3 numbers"),
        (lambda m, p: ["0.5", "1", "2"], "returned .*expected 3 numbers"),
        (lambda m, p: [[1.0], [2.0, 3.0], []], "expected 3 numbers"),
        (lambda m, p: [1j, 2j, 3j], "expected 3 numbers"),
        (lambda m, p: {"0": 1}, "expected 3 numbers"),
    ],
)
def test_a_reward_that_fails_is_named(reward, message):
    media, prompts = scenes(count=3)
    with pytest.raises(Fault, match=f"reward mine: .*{message}"):
        Scorer({"mine": reward}).scores(media, prompts)


@pytest.mark.parametrize("body", ["import nothing_of_that_name", "x = 1 / 0", "raise SystemError('no')"])
def test_a_file_that_cannot_be_imported_is_the_users_mistake(tmp_path, body):
    path = tmp_path / "broken.py"
    path.write_text(f"{body}\n\ndef f(media, prompts):\n    return []\n")
    with pytest.raises(UserError, match=r"rewards: .*broken.py:f: cannot be imported: \w+Error") as caught:
        load(f"{path}:f")
    assert "\n" not in caught.value.problems[0]


def test_a_score_too_large_to_add_up_is_none():
    media, prompts = scenes(count=3)
    scores = Scorer({"a": lambda m, p: [1.0, 1e308, -1e39]}).scores(media, prompts)
    assert scores.valid.tolist() == [True, False, False]


def test_a_file_may_import_what_stands_beside_it(tmp_path):
    (tmp_path / "beside_me.py").write_text("V = 0.25\n")
    (tmp_path / "mine.py").write_text(
        "import beside_me\n\ndef f(media, prompts):\n    return [beside_me.V] * len(prompts)\n"
    )
    media, prompts = scenes(count=2)
    assert load(f"{tmp_path}/mine.py:f")(media, prompts) == [0.25, 0.25]
    before = cache.version(catalog.find(f"{tmp_path}/mine.py:f"))
    (tmp_path / "beside_me.py").write_text("V = 0.5\n")
    assert cache.version(catalog.find(f"{tmp_path}/mine.py:f")) != before


def test_any_python_function_by_path(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def brightness(media, prompts):\n    return media.pixels.flatten(1).mean(1)\n")
    media, prompts = scenes(count=2)
    name = f"{path}:brightness"
    assert not catalog.find(name).differentiable
    torch.testing.assert_close(load(name)(media, prompts), media.pixels.flatten(1).mean(1))
    assert load("reward_models.jpeg_compressibility:incompressibility")(media, prompts)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shapes_genevil", "did you mean shapes_geneval"),
        ("./nowhere.py:f", "no file"),
        ("./nowhere.py", "name the function in it: ./nowhere.py:FUNCTION"),
        ("no.such.module:f", "no module"),
        ("{here}:missing", "defines no function 'missing', it defines present"),
        ("{broken}:f", "line 1"),
    ],
)
def test_a_bad_name_says_what_is_wrong(name, message, tmp_path):
    (tmp_path / "here.py").write_text("def present(media, prompts):\n    return []\n")
    (tmp_path / "broken.py").write_text("def f(:\n")
    with pytest.raises(LookupError, match=message):
        catalog.find(name.format(here=tmp_path / "here.py", broken=tmp_path / "broken.py"))


def test_a_module_without_the_function_is_refused_when_loaded():
    with pytest.raises(UserError, match="is not there, allowed is what can be called"):
        load("diffalign.types:nothing")


def test_a_score_that_is_not_the_known_one_is_caught(monkeypatch):
    entry = catalog.builtin()["jpeg_compressibility"]
    monkeypatch.setitem(catalog.builtin(), entry.name, replace(entry, known=(-1.42, -2.0, -5.446)))
    with pytest.raises(Fault, match=r"gave -1.2720 for the sample 'another', known is -2 within 0.05"):
        check("jpeg_compressibility")
    monkeypatch.setitem(catalog.builtin(), entry.name, replace(entry, known=(), ordered=True))
    with pytest.raises(Fault, match=r"gave -1.4200 for a picture as asked and -1.2720 for another; are its weights"):
        check("jpeg_compressibility")


def test_rewards_that_need_no_weights_have_known_scores():
    without = [name for name, entry in catalog.builtin().items() if not entry.known]
    assert without == [name for name, entry in catalog.builtin().items() if entry.weights]


def test_a_dead_reward_is_caught_by_its_check(tmp_path):
    path = tmp_path / "dead.py"
    path.write_text("def dead(media, prompts):\n    return [1.0] * len(prompts)\n")
    with pytest.raises(Fault, match="cannot tell them apart"):
        check(f"{path}:dead")
