"""Rewards written for other trainers, as they stand."""

import ast
import io
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from diffalign import train
from diffalign.errors import RewardFailed, UserError
from diffalign.evaluation import suite
from diffalign.rewards import catalog
from diffalign.rewards.check import check
from diffalign.rewards.load import load
from diffalign.rewards.scorer import Scorer
from diffalign.runs.parts import whole_groups
from diffalign.runs.probing import differences, probe, two
from diffalign.runtime.distributed import World
from diffalign.types import Media, Prompts
from tests.kit import ROOT
from tests.kit.helpers import tiny_config

OTHERS = Path(__file__).with_name("others.py")
# Those that take a prompt, then those that do not, with the part of the answer where one must be named.
WITH_PROMPTS = [
    *(
        "trl",
        "alignprop",
        "with_device",
        "without_device",
        "multi_score#avg",
        "geneval_strict#1",
        "Pointwise",
        "Tensors",
    ),
    *(
        "videoalign.reward#VQ",
        "hpsv3.reward#0",
        "imagereward.score",
        "hpsv2_score",
        "imscore.score",
        "image_and_prompt",
    ),
    *("images_and_texts", "array", "listed", "tensor", "waits", "partly", "two_letters", "signed", "lossy#1"),
]
WITHOUT = ["own_alone", "metric", "compiled", "image_alone", "images_alone", "bytes_of"]


def samples(count=4, frames=1, height=12, width=20):
    """Bytes, so that files and floats hold the same; prompts of several lengths."""
    shots = np.random.default_rng(0).integers(0, 256, (count, frames, height, width, 3))
    pixels = torch.from_numpy(shots).permute(0, 1, 4, 2, 3).double() / 255
    keys, texts = np.arange(count), ["a" * (k % 2 + 2 * k + 1) for k in range(count)]
    return Media(pixels, 5.0), Prompts(texts, keys // 2, keys, keys, [{"prompt": text, "tag": "t"} for text in texts])


def swapped(source):
    """A module with the parameters that functions must be given in the opposite order."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name not in (
            "value",
            "several",
            "__init__",
        ):
            first = int(bool(node.args.args) and node.args.args[0].arg == "self")
            last = len(node.args.args) - len(node.args.defaults)
            node.args.args[first:last] = reversed(node.args.args[first:last])
    return (
        ast.unparse(tree)
        .replace("'pil, prompt'", "'prompt, pil'")
        .replace("], prompts'", "]'")
        .replace("'float [-1,1]'", "'prompts, float [-1,1]'")
        .replace("'float [-1, 1]'", "'prompts, float [-1, 1]'")
    )


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The file of stubs, and the same with the order of parameters turned round."""
    place = tmp_path_factory.mktemp("others") / "swapped.py"
    place.write_text(swapped(OTHERS.read_text()))
    return OTHERS, place


def scored(name, given=None):
    return Scorer({"r": load(name, device="cpu")}).scores(*(given or samples())).by_name["r"]


@pytest.mark.parametrize("turned", [0, 1], ids=["", "swapped"])
def test_every_signature_scores_as_our_own_form_does(places, turned):
    """Floats of PIL's bytes and doubles are apart by rounding; a wrong form, prompt or order is off by more than 1e-2."""
    media, prompts = samples()
    expected = scored(f"{OTHERS}:own")
    alone = expected - np.array([len(text) / 50 for text in prompts.text])
    assert np.ptp(alone) > 1e-2
    for name in WITH_PROMPTS:
        np.testing.assert_allclose(scored(f"{places[turned]}:{name}"), expected, atol=1e-6, err_msg=name)
    for name in WITHOUT:
        np.testing.assert_allclose(scored(f"{places[turned]}:{name}"), alone, atol=1e-6, err_msg=name)
    assert scored(f"{places[turned]}:own").tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "vader",
            r"cannot tell what vader\(im_pix_un, prompts\) takes; name them images .* or write TAKES = \{'vader': ",
        ),
        (
            "geneval",
            r"cannot tell what geneval\(images, prompts, metadatas, only_strict\) takes: what is only_strict\? Give it a default",
        ),
        ("torchmetrics", r"cannot tell what torchmetrics\(\*args\) takes; .* one number a picture"),
        ("stars", r"cannot tell what stars\(\*args\) takes; .* one number a picture"),
        ("factory_of_factories", "makes what makes something; allowed is a function of pictures"),
        ("mixed", r"mixed\(image, prompts\) mixes one and several; allowed are image and prompt"),
        (
            "Needs",
            r"Needs is made from checkpoint; allowed here are device and dtype: make it in the file, x = Needs\(...\)",
        ),
        ("Uncalled", r"a Uncalled cannot be called; allowed is one of its methods: x = Uncalled\(\) and x.score"),
        ("as_loss", "made with as_loss, a mean; allowed is one number a picture"),
    ],
)
def test_what_cannot_be_told_is_refused_before_anything_is_scored(name, said):
    with pytest.raises(UserError, match=said) as caught:
        load(f"{OTHERS}:{name}", device="cpu")
    assert len(caught.value.problems) == 1


def test_a_plain_function_is_refused_before_its_file_is_imported(tmp_path):
    (tmp_path / "r.py").write_text(
        "raise SystemError\ndef f(a, b): ...\ndef g(images, *, k): ...\ndef h(images, k=1): ...\n"
    )
    assert "cannot tell what f(a, b) takes" in catalog.problems(f"{tmp_path}/r.py:f", [])[0][0]
    assert "what is k?" in catalog.problems(f"{tmp_path}/r.py:g", [])[0][0]
    assert catalog.problems(f"{tmp_path}/r.py:h#VQ", [])[0] == []
    assert "after # stands a part" in catalog.problems(f"{tmp_path}/r.py:h#", [])[0][0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("batch_mean", "returned one number for 4 pictures, allowed is one number a picture"),
        ("t2v", "returned 4 x 4 numbers, allowed is one a picture, or #0 to #3"),
        ("two_numbers", "returned 4 x 2 numbers, allowed is one a picture, or #0 to #1"),
        ("two_numbers#2", "returned 4 x 2 numbers"),
        ("three_parts", "returned a dict; allowed after the reward's name is #quality, #motion"),
        ("three_parts#speed", "returned a dict without 'speed'; allowed after the reward's name is #quality, #motion"),
        ("dicts", "returned a dict; allowed after the reward's name is #VQ, #MQ"),
        ("geneval_strict", "returned 5 things; allowed after the reward's name is #0 to #4"),
        ("lossy", "returned one number for 4 pictures"),
        ("one_too_few", r"returned numbers of shape \(3,\) for 4 pictures"),
        ("words", r"returned \['good'.*allowed is one number a picture"),
        ("trl#VQ", "returned one number a picture, which has no part 'VQ'"),
    ],
)
def test_an_answer_that_is_not_one_number_a_picture_is_refused_in_a_line(name, said):
    with pytest.raises(RewardFailed, match=f"reward r: {said}") as caught:
        scored(f"{OTHERS}:{name}")
    assert "\n" not in str(caught.value)


def test_no_score_is_none_and_truth_is_a_number(tmp_path):
    (tmp_path / "r.py").write_text(
        "n = 0\ndef f(image):\n    global n; n += 1\n    return [0.5, None, float('nan'), True][n - 1]\n"
        "def g(images): return [v > 1 for v in range(len(images))]\n"
    )
    np.testing.assert_array_equal(scored(f"{tmp_path}/r.py:f"), [0.5, np.nan, np.nan, 1.0])
    assert scored(f"{tmp_path}/r.py:g").tolist() == [0, 0, 1, 1]


def test_what_one_does_to_its_pictures_another_does_not_see(tmp_path):
    (tmp_path / "r.py").write_text(
        "def f(images, prompts, metadata):\n    images.mul_(0)\n    return images.sum((1, 2, 3))\n"
    )
    media, prompts = samples()
    rewards = {"zero": load(f"{tmp_path}/r.py:f", device="cpu"), "own": load(f"{OTHERS}:trl", device="cpu")}
    found = Scorer(rewards).scores(media, prompts).by_name
    assert found["zero"].tolist() == [0] * 4
    np.testing.assert_allclose(found["own"], scored(f"{OTHERS}:own"))


FORMS = """
import io
import numpy as np
from PIL import Image
def size(picture):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=95)
    return file.tell()
TAKES = {"f_float": "float", "f_uint8": "uint8", "f_nhwc": "nhwc", "f_pil": "pil", "f_path": "path", "f_one": "nhwc one"}
def f_float(images): return [size((x.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)) for x in images]
def f_uint8(images): return [size(x.permute(1, 2, 0).numpy()) for x in images]
def f_nhwc(images): return [size(x) for x in images]
def f_pil(images): return [size(np.asarray(x)) for x in images]
def f_path(images): return [size(np.asarray(Image.open(x))) for x in images]
def f_one(images): return size(images)
"""


def test_a_picture_is_the_same_in_every_form(tmp_path):
    """As bytes it is rounded: 0.49 of a step below a byte is that byte, and no channel is another."""
    (tmp_path / "r.py").write_text(FORMS)
    media, prompts = samples()
    media = Media((media.pixels - 0.49 / 255).clamp(min=0))
    sizes = []
    for frame in (media.pixels[:, 0] * 255).round().byte().permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "JPEG", quality=95)
        sizes.append(file.tell())
    assert len(set(sizes)) > 1
    for form in ("float", "uint8", "nhwc", "pil", "path", "one"):
        assert scored(f"{tmp_path}/r.py:f_{form}", (media, prompts)).tolist() == sizes, form


def test_clips_come_whole_to_those_that_take_them_and_frame_by_frame_to_others(tmp_path):
    (tmp_path / "r.py").write_text(
        "import imageio.v3 as imageio, numpy as np, os\n"
        "seen = []\n"
        "def still(images): return [float(np.asarray(i)[..., 0].mean()) / 255 for i in images]\n"
        "def frames(videos): return [float(np.asarray(v[1])[..., 0].mean()) / 255 for v in videos]\n"
        "def files(video_paths):\n"
        "    seen.extend(video_paths)\n"
        "    assert all(imageio.immeta(p)['fps'] == 5 for p in video_paths)\n"
        "    return [imageio.imread(p)[1, ..., 0].mean() / 255 for p in video_paths]\n"
        "def left(video_paths): return [float(os.path.exists(p)) for p in seen][:len(video_paths)]\n"
    )
    given = samples(2, frames=3)
    red = given[0].pixels[:, :, 0].flatten(2).mean(2).numpy()
    np.testing.assert_allclose(scored(f"{tmp_path}/r.py:still", given), red.mean(1))
    np.testing.assert_allclose(scored(f"{tmp_path}/r.py:frames", given), red[:, 1])
    both = {name: load(f"{tmp_path}/r.py:{name}", device="cpu") for name in ("files",)}
    np.testing.assert_allclose(Scorer(both).scores(*given).by_name["files"], red[:, 1])  # without loss
    seen = both["files"].function.__globals__["seen"]
    assert len(seen) == 2
    assert not any(os.path.exists(path) for path in seen)
    np.testing.assert_allclose(scored(f"{OTHERS}:Pointwise", given), scored(f"{OTHERS}:own", given))  # its first frame


def test_small_pictures_are_refused():
    with pytest.raises(RewardFailed, match="pictures of 4 x 20 pixels, allowed are sides of at least 8"):
        scored(f"{OTHERS}:trl", samples(height=4))


def test_a_gradient_passes_where_it_is_declared_and_tensors_are_taken(tmp_path):
    media, prompts = samples()
    shown = Media(media.pixels.clone().requires_grad_())
    scorer = Scorer({"r": load(f"{OTHERS}:alignprop", device="cpu")})
    scorer.pathwise(prompts, {})(shown).sum().backward()
    # By hand: a ramp over rows for red, -0.3 for blue, both a mean over the picture.
    ramp = torch.linspace(0, 1, 12, dtype=torch.float64)[:, None].expand(12, 20) / 240
    torch.testing.assert_close(shown.pixels.grad[2, 0, 0], ramp)
    torch.testing.assert_close(shown.pixels.grad[2, 0, 2], torch.full((12, 20), -0.3 / 240, dtype=torch.float64))
    (tmp_path / "r.py").write_text("DIFFERENTIABLE = ['f']\ndef f(images): ...\n")
    with pytest.raises(
        UserError, match="DIFFERENTIABLE names it, and it takes images: PIL pictures.*allowed with a gradient are float"
    ):
        load(f"{tmp_path}/r.py:f", device="cpu")


# -- the probe


PROBED = """
def alone(images, prompts, metadata): return images.mean((1, 2, 3))
def by_largest(images, prompts, metadata): return images.mean((1, 2, 3)) / images.max()
def by_place(images): return [k + 0.0 for k in range(len(images))]
def first_prompt(images, prompts): return [len(prompts[0]) + 0.0] * len(images)
"""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("alone", []),
        ("by_largest", ["beside one, .* alone, .* apart"]),
        ("by_place", ["alone", "in the other's place"]),
        ("first_prompt", ["alone", "in the other's place"]),
    ],
)
def test_a_score_that_depends_on_another_sample_is_told(tmp_path, name, said):
    """Two samples that were alike would tell nothing of it."""
    (tmp_path / "r.py").write_text(PROBED)
    media, prompts = samples(2)
    media.pixels[0] *= 0.5
    reward = load(f"{tmp_path}/r.py:{name}", device="cpu")
    assert reward.probed
    lines = differences(Scorer({"r": reward}), media, prompts)
    assert len(lines) == len(said)
    assert all(re.search(pattern, line) for pattern, line in zip(said, lines, strict=True)), lines


def test_the_probe_is_for_other_forms_and_can_be_left_out(tmp_path):
    def never(*given):
        raise AssertionError("asked")

    def tried(name, *overrides):
        parts = SimpleNamespace(policy=None, judges=Scorer({name: load(name, device="cpu")}), scorer=Scorer({}))
        probe(tiny_config(tmp_path, *overrides), parts, never, never)

    tried("jpeg_compressibility")
    tried(f"{OTHERS}:own")
    tried(f"{OTHERS}:trl", "scoring.probe=false")
    with pytest.raises(AssertionError, match="asked"):
        tried(f"{OTHERS}:trl")


# -- Flow-Factory's classes


def test_fields_that_prompts_lack_are_named():
    media, prompts = samples()
    with pytest.raises(
        RewardFailed, match="required_fields name 'tag', allowed are image, video, and what every prompt has: prompt"
    ):
        scored(f"{OTHERS}:Tensors", (media, replace(prompts, metadata=[{"prompt": "a"}] * 4)))


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_groups_come_whole_and_in_order_to_those_that_compare(processes):
    """Micro-batches are dealt to processes; whole groups in them stay whole."""
    media, prompts = samples(16)
    prompts = replace(prompts, group=np.repeat(np.arange(4), 4), text=[f"prompt {k // 4}" for k in range(16)])
    found = np.full(16, np.nan)
    for rank in range(processes):
        rows = World(rank, processes).rows(16, 4)
        reward = load(f"{OTHERS}:MyGroupwiseRewardModel", device="cpu")
        reward.sizes = (4,)
        for part in np.split(np.asarray(rows), len(rows) // 4):
            found[part] = Scorer({"r": reward}).scores(Media(media.pixels[part]), prompts.select(part)).by_name["r"]
    values = scored(f"{OTHERS}:own_alone", (media, prompts)).reshape(4, 4)
    np.testing.assert_allclose(found, (np.argsort(np.argsort(values, 1), 1) + np.arange(4) / 100).ravel())
    with pytest.raises(RewardFailed, match="compares the samples of a group and got one of 2; allowed is 4"):
        Scorer({"r": reward}).scores(Media(media.pixels[:6]), prompts.select(range(6)))


def test_groups_that_micro_batches_would_cut_are_refused_beforehand(tmp_path):
    def sizes(*overrides):
        return whole_groups(tiny_config(tmp_path, *overrides), "r")  # 2 groups of 2, 4 a micro-batch

    assert sizes("evaluation.enabled=false") == (2,)
    assert sizes("evaluation.images_per_prompt=4") == (2, 4)
    with pytest.raises(UserError, match="evaluation.images_per_prompt: got 1 with optimizer.micro_batch 4, r compares"):
        sizes()
    alone = SimpleNamespace(rewards=[f"{OTHERS}:MyGroupwiseRewardModel"], together=lambda: [[0, 1], [2]])
    with pytest.raises(UserError, match="--judges: .*MyGroupwiseRewardModel compares the samples of a prompt, got one"):
        suite._scorer(alone, print)
    with pytest.raises(UserError, match="prompts.group_size: got 6 with optimizer.micro_batch 4"):
        sizes("prompts.group_size=6", "evaluation.enabled=false")


@pytest.mark.parametrize(("groups", "micro_batch", "rollouts"), [(2, 4, 1), (2, 2, 2), (1, 1, 2), (1, 2, 1)])
def test_two_different_samples_are_drawn_in_whole_micro_batches(groups, micro_batch, rollouts):
    drawn = []

    class Drawer:
        schedule = SimpleNamespace(steps=3)

        def rollout(self, prompts, plan):
            drawn.append(len(prompts))
            return SimpleNamespace(x=[prompts], prompts=prompts)

        def decode(self, part, x):
            return Media(torch.tensor(x.seed)[:, None, None, None, None].double())

    policy = Drawer()
    policy.micro_batch = micro_batch
    _, pool = samples()

    def draw(update):
        given = pool.select(range(2 * groups)) if micro_batch > 1 or groups > 1 else pool.select([update])
        return replace(given, text=[f"prompt {k // 2}" for k in range(len(given))])

    media, prompts = two(policy, draw)
    assert drawn == [micro_batch] * rollouts
    assert media.pixels.flatten().tolist() == prompts.seed.tolist()
    assert prompts.seed[0] != prompts.seed[1]
    assert len(set(prompts.text)) == groups


# -- from end to end


@pytest.mark.parametrize(
    ("name", "preset", "says"),
    [
        ("trl", "flow_grpo/shapes-sd3", ""),
        ("with_device", "flow_grpo/shapes-sd3", ""),
        ("coupled", "flow_grpo/shapes-sd3", "a sample's score depends on others: "),
        ("alignprop", "truncated_bp/shapes-sd3", ""),
        ("MyGroupwiseRewardModel", "flow_grpo/shapes-sd3", ""),
    ],
)
def test_functions_of_other_projects_train(name, preset, says, tmp_path, capsys):
    alone = ["updates=1", "eval_rewards=[]", "evaluation.enabled=false", "device=cpu"]
    train(tiny_config(tmp_path, f"rewards={{{OTHERS}:{name}: 1.0}}", *alone, name=preset))
    said = "".join(capsys.readouterr())
    assert f"reward/{OTHERS}:{name}" in (tmp_path / "metrics.jsonl").read_text()
    assert ("depends on others" in said) == bool(says)
    assert says in said


def blocks():
    """Files that the page shows, each with the names that its config has."""
    page = (ROOT / "docs" / "your-own-reward.md").read_text(encoding="utf-8")
    found = re.findall(r"```(\w+)\n(.*?)```", page, re.S)
    for number, (language, text) in enumerate(found):
        if language == "yaml":
            before = found[number - 1] if number else ("", "")
            yield before[1] if before[0] in ("python", "py") else "", list(yaml.safe_load(text)["rewards"])


STAND_INS = {
    "flow_grpo/rewards": "from others import with_device as pickscore_score\n"
    "def multi_score(device, weights):\n    from others import multi_score\n    return multi_score(device)\n",
    "flow_factory/rewards/pick_score": "from others import Pointwise as PickScoreRewardModel\n",
    "ImageReward": "def load(name):\n    from others import imagereward\n    return imagereward\n",
    "hpsv2": "from others import hpsv2_score as score\n",
    "hpsv3": "from others import HPSv3\ndef HPSv3RewardInferencer(device): return HPSv3()\n",
    "inference": "from others import VideoAlign\ndef VideoVLMRewardInference(place, device): return VideoAlign()\n",
    "pyiqa": "def create_metric(name):\n    from others import metric\n    return metric\n",
    "torchmetrics/multimodal": "class CLIPScore:\n    def __call__(self, images, text): return images.double().mean()\n",
}


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Stand-ins for what the page imports, gone afterwards."""
    monkeypatch.setattr(sys, "path", [str(tmp_path / "packages"), str(OTHERS.parent), *sys.path])
    tops = {"others", *(name.partition("/")[0] for name in STAND_INS)}
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in tops}
    for name, code in STAND_INS.items():
        place = tmp_path / "packages" / f"{name}.py"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(code)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in tops]:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.mark.parametrize("number", range(len(list(blocks()))))
@pytest.mark.usefixtures("packages")
def test_what_the_page_shows_scores(number, tmp_path, monkeypatch):
    code, names = list(blocks())[number]
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(code)
    for name in names:
        assert catalog.problems(name, [])[0] == []
        assert len(set(scored(name))) == 4


def test_the_check_says_what_was_recognised():
    assert check(f"{OTHERS}:imagereward.score")[1] == "takes     image: PIL pictures, prompt: texts, one sample a call"
    assert check(f"{OTHERS}:multi_score#avg")[1].endswith("all samples at once; part 'avg' of the answer")
    assert (
        check(f"{OTHERS}:metric")[1]
        == "takes     target: float tensors in [0, 1], all samples at once; lower is better"
    )
    assert check(f"{OTHERS}:MyGroupwiseRewardModel")[-1] == "ok"
