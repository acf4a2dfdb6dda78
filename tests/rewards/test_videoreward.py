"""VideoReward: frames by time, its LoRA, its units, and three marks for the price of one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffalign.config import load as load_config
from diffalign.errors import Fault, UserError
from diffalign.planning.demand import GIB, judges
from diffalign.rewards import catalog
from diffalign.rewards.base import Column
from diffalign.rewards.check import check
from diffalign.rewards.load import Judges, load
from diffalign.rewards.remote import Remote
from diffalign.rewards.scorer import Scorer
from diffalign.types import Media, Prompts
from reward_models import _qwen_files, videoreward
from reward_models._qwen_pixels import moments, resized
from tests.rewards import qwen

NAMES = ("videoreward", "videoreward_vq", "videoreward_mq", "videoreward_ta")
TEXTS = ["a red circle moving right", "a green star, {x}, moving up"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`videoreward@PLACE`; our text is its question meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        qwen.asked(patch, "videoreward")
        yield qwen.videoreward_folder(tmp_path_factory.mktemp("videoreward"))


def given(frames: int = 5, fps: float | None = 8.0) -> tuple[Media, Prompts]:
    pixels = torch.rand(len(TEXTS), frames, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    keys = np.arange(len(TEXTS))
    return Media(pixels, fps), Prompts(list(TEXTS), keys, keys, keys, [{} for _ in TEXTS])


def together(folder: Path, names: tuple[str, ...] = NAMES) -> dict[str, Column]:
    loaded: Judges = {}
    return {name: load(f"{name}@{folder}", judges=loaded) for name in names}


@pytest.mark.parametrize(
    ("count", "fps", "expected"),
    [
        (81, 16, [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]),  # Wan: 5.06 s, 10 frames, 80 / 9 apart
        (121, 24, [0, 13, 27, 40, 53, 67, 80, 93, 107, 120]),  # LTX
        (33, 16, [0, 11, 21, 32]),  # 2.06 s
        (5, 8, [0, 1, 3, 4]),  # 0.6 s: four at least
        (49, 8, [0, 4, 9, 13, 17, 22, 26, 31, 35, 39, 44, 48]),  # 6.1 s, 12.25 frames
    ],
)
def test_frames_are_taken_by_time_two_a_second_and_an_even_number(count, fps, expected):
    assert moments(count, fps).tolist() == expected


@pytest.mark.parametrize(
    ("frames", "fps", "expected"),
    [
        (3, 8.0, "got videos of 3 frames, allowed are 4 and more"),
        (5, None, "None frames a second"),
        (5, 0.0, "0.0 fra"),
    ],
)
def test_what_has_no_time_is_refused_and_not_scored(frames, fps, expected, folder):
    media, prompts = given(frames, fps)
    with pytest.raises(Fault, match=f"reward videoreward: .*{expected}"):
        Scorer({"videoreward": load(f"videoreward@{folder}")}).scores(media, prompts)


def test_marks_are_those_of_the_base_with_its_lora_beside_in_the_checkpoints_units(folder, tmp_path):
    """By forward hooks instead of merging; the sum is of standardised marks."""
    place = tmp_path / "parts"
    weights, lora = qwen.videoreward_parts(place)
    media, prompts = given()
    found = load(f"videoreward@{folder}").judge(media, prompts)
    body, _ = _qwen_files.renamed(weights)
    judge = load(f"videoreward@{folder}").judge
    judge.net = _qwen_files.network(str(place / "Qwen2-VL-2B-Instruct"), body, judge.words.rows)
    for key in lora:
        layer, _, half = key.partition(".lora_")
        if half == "A.weight":
            a, b = lora[f"{layer}.lora_A.weight"], lora[f"{layer}.lora_B.weight"]
            module = judge.net.get_submodule(layer.replace("model.", "language_model.", 1))
            module.register_forward_hook(lambda m, x, y, a=a, b=b: y + qwen.ALPHA / qwen.RANK * x[0] @ a.T @ b.T)
    judge.mean, judge.std = torch.zeros(3), torch.ones(3)
    raw = judge(media, prompts)[:, :3]
    units = {
        part: torch.tensor([qwen.UNITS[f"{mark}_{part}"] for mark in videoreward.MARKS]) for part in ("mean", "std")
    }
    wanted = (raw - units["mean"]) / units["std"]
    torch.testing.assert_close(found[:, :3], wanted, atol=1e-4, rtol=1e-4)  # float32 sums in another order
    torch.testing.assert_close(found[:, 3], wanted.sum(1), atol=2e-4, rtol=1e-4)
    assert float((raw.sum(1) - found[:, 3]).abs().max()) > 0.1


def test_each_mark_is_read_at_its_own_token_by_its_own_row(folder):
    judge = load(f"videoreward@{folder}").judge
    media, prompts = given()
    seen = media.pixels[:, [0, 1, 3, 4]]
    shown = resized(seen, 128 * 64, qwen.MOST, 8)
    assert 128 * 64 <= shown.shape[-1] * shown.shape[-2] <= qwen.MOST
    states, matrix = judge.states(shown, prompts.text), judge.head.weight
    wanted = torch.stack([states[:, k] @ matrix[k] for k in range(3)], dim=1)
    torch.testing.assert_close(judge.marks(shown, prompts.text), wanted, atol=1e-5, rtol=1e-5)


def test_time_counts_and_speed_does(folder):
    reward = load(f"videoreward_mq@{folder}")
    media, prompts = given(9)
    with torch.no_grad():
        forward, backward = (reward(Media(pixels, 8.0), prompts) for pixels in (media.pixels, media.pixels.flip(1)))
        slow = reward(Media(media.pixels, 3.0), prompts)  # three seconds: six frames
    assert float((forward - backward).abs().min()) > 1e-3
    assert float((forward - slow).abs().min()) > 1e-3


# -- J33


def test_marks_asked_for_together_are_one_load_and_one_forward_and_the_same_numbers(folder, monkeypatch):
    loads, own = [], _qwen_files.network
    monkeypatch.setattr(_qwen_files, "network", lambda *args: loads.append(1) or own(*args))
    rewards = together(folder)
    assert len(loads) == 1
    assert len({id(net) for reward in rewards.values() for net in reward.networks()}) == 2  # the network and the head
    forwards: list[int] = []
    rewards["videoreward"].judge.net.visual.register_forward_hook(lambda *args: forwards.append(1))
    media, prompts = given()
    weights = dict(zip(NAMES, (0.0, 1.0, 1.0, 1.0), strict=True))
    scorer = Scorer(rewards, weights, offload=True)
    scores = scorer.scores(media, prompts)
    assert len(forwards) == 1
    np.testing.assert_allclose(scores.by_name["videoreward"], scores.total, rtol=1e-5)
    pixels = media.pixels.clone().requires_grad_()
    total = scorer.pathwise(prompts, {})(Media(pixels, media.fps))
    (slope,) = torch.autograd.grad(total.sum(), pixels)
    assert len(forwards) == 2
    for name in NAMES:
        alone = load(f"{name}@{folder}")
        x = media.pixels.clone().requires_grad_()
        value = alone(Media(x, media.fps), prompts)
        np.testing.assert_allclose(value.detach().numpy(), scores.by_name[name], rtol=1e-5, atol=1e-5)
        if name == "videoreward":
            torch.testing.assert_close(torch.autograd.grad(value.sum(), x)[0], slope, rtol=1e-4, atol=1e-5)
    assert len(loads) == 1 + len(NAMES)


def test_a_second_batch_is_asked_anew(folder):
    scorer = Scorer(together(folder))
    (a, prompts), (b, _) = given(), given()
    b = Media(b.pixels.flip(0), b.fps)
    first, second = (scorer.scores(media, prompts).by_name["videoreward"] for media in (a, b))
    assert np.abs(first - second).max() > 1e-3


def test_plan_counts_a_judge_of_several_marks_once():
    name = "flow_grpo/videoreward-wan21"
    config = load_config(name)
    assert sum(name.startswith("videoreward") for name in config.rewards) == 3
    training, evaluating = judges(config)
    wanted = catalog.builtin()["videoreward"].memory * GIB
    assert sum(training.values()) == wanted  # in bfloat16 as it is, whatever memory.judge_precision says
    assert sum(judges(load_config(name, ["memory.judge_precision=bfloat16"]))[0].values()) == wanted
    both = training | evaluating
    assert (
        sum(both.values())
        == wanted + sum(catalog.builtin()[n].memory for n in config.eval_rewards if n not in NAMES) * GIB
    )


# -- files


def test_an_adapter_with_what_was_trained_beside_it_is_the_same_judge(folder, tmp_path):
    weights, lora = qwen.videoreward_parts(tmp_path / "adapter")
    step = tmp_path / "adapter" / videoreward.STEP
    beside = ("visual.", "rm_head.", "model.embed_tokens.")
    wrapped = {f"base_model.model.{key}": value for key, value in weights.items() if key.startswith(beside)}
    torch.save(wrapped, step / videoreward.OTHERS)
    save_file({f"base_model.model.{key}": value for key, value in lora.items()}, step / videoreward.ADAPTER)
    base = {key: value.contiguous() for key, value in weights.items() if not key.startswith(("rm_head.", "lm_head."))}
    base = {key: torch.zeros_like(value) if key.startswith("visual.") else value for key, value in base.items()}
    save_file(base, tmp_path / "adapter" / "Qwen2-VL-2B-Instruct" / "model.safetensors")
    media, prompts = given()
    whole, parts = (load(f"videoreward@{place}")(media, prompts) for place in (folder, tmp_path / "adapter"))
    torch.testing.assert_close(whole, parts)


def changed(place: Path, change) -> None:
    path = place / videoreward.STEP / videoreward.WHOLE
    weights = torch.load(path)
    change(weights)
    torch.save(weights, path)


def without(place: Path, section: str, key: str) -> None:
    said = json.loads((place / videoreward.CONFIG).read_text())
    del said[section][key]
    (place / videoreward.CONFIG).write_text(json.dumps(said))


LAYER = "base_model.model.model.layers.1.self_attn.v_proj"
SPOILT = {
    "half": (
        lambda p: changed(p, lambda w: w.pop(f"{LAYER}.lora_B.default.weight")),
        "LoRA of .*v_proj lacks .*lora_B",
    ),
    "base": (
        lambda p: changed(p, lambda w: w.pop(f"{LAYER}.base_layer.weight")),
        "LoRA of .*v_proj lacks .*v_proj.weight",
    ),
    "extra": (lambda p: changed(p, lambda w: w.update({"other": torch.ones(1)})), "takes, other"),
    "rows": (
        lambda p: changed(p, lambda w: w.update({"base_model.model.rm_head.weight": torch.ones(2, 16)})),
        "has 2 rows",
    ),
    "zero": (lambda p: changed(p, lambda w: w["base_model.model.rm_head.weight"].zero_()), "weight is zero"),
    "steps": (lambda p: (p / "checkpoint-7").mkdir(), "holds checkpoint-11352, checkpoint-7, allowed is one"),
    "units": (lambda p: without(p, "inference_config", "MQ_std"), "lacks inference_config.MQ_std"),
    "pixels": (lambda p: without(p, "data_config", "max_frame_pixels"), "lacks data_config.max_frame_pixels"),
    "pickle": (lambda p: (p / videoreward.STEP / videoreward.WHOLE).write_bytes(b"no"), "cannot be read as weights"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_checkpoint_that_is_not_whole_is_refused_by_name(how, folder, tmp_path):
    change, expected = SPOILT[how]
    change(shutil.copytree(folder, tmp_path / "spoilt"))
    with pytest.raises(UserError, match=expected):
        load(f"videoreward@{tmp_path / 'spoilt'}")


def test_its_check_passes_for_each_mark(folder):
    for name in NAMES:
        assert check(f"{name}@{folder}")[-1] == "ok"


@pytest.mark.parametrize("section", ["rewards={videoreward: 1.0}", "eval_rewards=[videoreward_mq]"])
def test_a_run_says_how_fast_its_videos_are(section):
    expected = r"rewards: videoreward\w* goes by time, .* sampler.fps"
    with pytest.raises(UserError, match=expected):
        load_config("flow_grpo/shapes-wan", [section])
    assert load_config("flow_grpo/shapes-wan", [section, "sampler.fps=8"]).sampler.fps == 8


@pytest.mark.parametrize(("fps", "told"), [(16.0, {"fps": 16.0}), (None, {})])
def test_a_server_is_told_how_fast_videos_are_or_nothing(fps, told):
    media, prompts = given(fps=fps)
    body = Remote("mine", ("http://127.0.0.1:9/score",))._body(media, prompts, [0])
    assert {key: value for key, value in body.items() if key == "fps"} == told
