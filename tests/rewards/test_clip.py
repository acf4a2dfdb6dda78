"""Rewards on CLIP models against the reference packages, with tiny random weights laid out as the published ones."""

import importlib.util
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from diffalign.config import load as load_config
from diffalign.errors import Fault, UserError
from diffalign.rewards import catalog
from diffalign.rewards.base import Wrapped
from diffalign.rewards.check import check
from diffalign.rewards.load import load
from diffalign.rewards.narrow import Narrow, difference
from diffalign.rewards.scorer import Scorer
from diffalign.runs.parts import build
from diffalign.runs.session import train
from diffalign.types import Media, Prompts
from reward_models import _clip, hpsv2
from tests.kit.helpers import tiny_config

TEXTS = ["two red stars", "a photo of a green circle left of a blue square", ""]
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP as the hub lays it out; eos_token_id 2 is what the published configs say."""
    place = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**small, "vocab_size": 49408, "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """HPSv2's file: a pickle whose key `state_dict` holds open_clip's weights."""
    place = tmp_path_factory.mktemp("hps")
    (place / "tiny-hps.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(place)
    torch.manual_seed(0)
    net = open_clip.create_model("tiny-hps", pretrained=None)
    torch.save({"epoch": 3, "state_dict": net.state_dict()}, place / "HPS_v2.1_compressed.pt")
    return SimpleNamespace(path=place / "HPS_v2.1_compressed.pt", net=net.eval())


def given(frames: int = 1, side: tuple[int, int] = (48, 64)) -> tuple[Media, Prompts]:
    pixels = torch.rand(3, frames, 3, *side, generator=torch.Generator().manual_seed(1))
    keys = np.arange(3)
    return Media(pixels), Prompts(list(TEXTS), keys, keys, keys, [{}] * 3)


def pictures(media: Media) -> list[Image.Image]:
    rounded = media.pixels[:, 0].mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(one) for one in rounded]


def published_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer as transformers has it, from the vocabulary that comes with open_clip."""
    simple = SimpleTokenizer()
    named = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocab = {named.get(token, token): index for token, index in simple.encoder.items()}
    return CLIPTokenizer(vocab=vocab, merges=sorted(simple.bpe_ranks, key=simple.bpe_ranks.get))


def reference(folder, media: Media) -> tuple[torch.Tensor, CLIPModel]:
    """Cosines as the reference code gets them: pictures through PIL, transformers' own tokenizer and processor."""
    tokenizer = published_tokenizer()
    net = CLIPModel.from_pretrained(folder).eval()
    size = {"shortest_edge": 32}
    processor = CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32})
    ids = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = net(pixel_values=processor(pictures(media), return_tensors="pt")["pixel_values"], **ids)
    return (out.image_embeds * out.text_embeds).sum(1), net


def test_tokens_are_those_of_transformers():
    tokenizer = published_tokenizer()
    for text in [*TEXTS, "A  Photo, of: it's 3 cats' eyes! " * 12]:
        expected = tokenizer(text, truncation=True, max_length=77).input_ids
        assert _clip.tokens([text])[0, : len(expected)].tolist() == expected


@pytest.mark.parametrize("name", ["clipscore", "pickscore"])
def test_scores_agree_with_transformers(name, folder):
    media, prompts = given()
    cosine, net = reference(folder, media)
    found = load(f"{name}@{folder}")(media, prompts)
    factor = float(net.logit_scale.exp()) / 26 if name == "pickscore" else 1.0
    # The reference resizes pictures of 8 bits, with results of 8 bits.
    torch.testing.assert_close(found, factor * cosine, rtol=0, atol=3e-3 * factor)
    assert float(found.detach().std()) > 5 * 3e-3 * factor


def test_hps_agrees_with_open_clip_and_hpsv2s_own_preprocessing(checkpoint, monkeypatch):
    """Longest side to 224 on the tensor, black around it, then mean and deviation; the cosine without a factor."""
    from torchvision.transforms.v2 import functional as tv

    monkeypatch.setattr(hpsv2.HPSv2, "architecture", "tiny-hps")
    media, prompts = given()
    found = load(f"hpsv2.1@{checkpoint.path}")(media, prompts)
    shrunk = tv.resize(media.pixels[:, 0], [24, 32], interpolation=tv.InterpolationMode.BICUBIC, antialias=True)
    padded = tv.pad(shrunk, [0, 4, 0, 4], fill=0.0)
    inputs = tv.normalize(padded, list(_clip.MEAN), list(_clip.STD))
    with torch.no_grad():
        image = checkpoint.net.encode_image(inputs, normalize=True)
        text = checkpoint.net.encode_text(open_clip.get_tokenizer("ViT-H-14")(TEXTS), normalize=True)
    torch.testing.assert_close(found, (image * text).sum(1), rtol=0, atol=1e-5)
    assert float(found.detach().std()) > 1e-2


@pytest.mark.parametrize("side", [(64, 64), (96, 64), (50, 33), (32, 32), (20, 44)])
def test_cropping_is_pils_within_rounding(side):
    # smooth and rough pictures alike
    media, _ = given(side=side)
    processor = CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_normalize=False
    )
    expected = processor(pictures(media), return_tensors="pt")["pixel_values"]
    found = _clip.crop(media.pixels[:, 0], 32)
    # PIL takes and gives 8 bits: two roundings, of 1 / 510 at most each
    assert float((found - expected).abs().mean()) < 2e-3
    plain = F.interpolate(media.pixels[:, 0], (32, 32), mode="bicubic")
    if side == (64, 64):
        assert float((plain - expected).abs().mean()) > 0.05  # without antialiasing it would be another picture


@pytest.mark.parametrize(
    ("side", "bars"), [((64, 32), (0, 8)), ((32, 64), (8, 0)), ((32, 32), (0, 0)), ((64, 64), (0, 0))]
)
def test_padding_keeps_the_whole_picture(side, bars):
    found = _clip.pad(torch.ones(1, 3, *side), 32)
    assert found.shape == (1, 3, 32, 32)
    expected = torch.zeros(32, 32)
    expected[bars[0] : 32 - bars[0], bars[1] : 32 - bars[1]] = 1
    torch.testing.assert_close(found[0, 0], expected)


@pytest.mark.parametrize("name", ["clipscore", "pickscore", "hpsv2.1"])
def test_gradients_are_finite_differences(name, folder, checkpoint, monkeypatch):
    monkeypatch.setattr(hpsv2.HPSv2, "architecture", "tiny-hps")
    reward = load(f"{name}@{checkpoint.path if name.startswith('hps') else folder}")
    reward.reward.net.double()
    media, prompts = given()
    pixels = (0.1 + 0.8 * media.pixels.double()).requires_grad_()
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # differences in float32 are mostly rounding
    (slope,) = torch.autograd.grad(reward(Media(pixels), prompts).sum(), pixels)
    direction = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(2), dtype=pixels.dtype)
    with torch.no_grad():
        up, down = (reward(Media(pixels + sign * 1e-5 * direction), prompts).sum() for sign in (1, -1))
    assert float((slope * direction).sum()) == pytest.approx(float(up - down) / 2e-5, rel=1e-5)


def test_a_video_scores_the_mean_of_its_frames(folder):
    reward = load(f"clipscore@{folder}")
    media, prompts = given(frames=4)
    alone = [reward(Media(media.pixels[:, k : k + 1]), prompts) for k in range(4)]
    torch.testing.assert_close(reward(media, prompts), torch.stack(alone).mean(0), rtol=1e-5, atol=1e-6)


def test_weights_in_half_precision_score_in_float32(folder, tmp_path):
    CLIPModel.from_pretrained(folder).half().save_pretrained(tmp_path)
    media, prompts = given()
    rounded = CLIPModel.from_pretrained(folder)
    rounded.load_state_dict(
        {k: v.half().float() if v.is_floating_point() else v for k, v in rounded.state_dict().items()}
    )
    rounded.save_pretrained(tmp_path / "whole")
    found, expected = (load(f"clipscore@{place}")(media, prompts) for place in (tmp_path, tmp_path / "whole"))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_every_picture_is_scored_against_its_own_prompt(folder):
    """Two public implementations score all against the first."""
    reward = load(f"clipscore@{folder}")
    media, prompts = given()
    order = [2, 0, 1]
    found = reward(Media(media.pixels[order]), prompts.select(order))
    torch.testing.assert_close(found, reward(media, prompts)[order])
    alone = reward(Media(media.pixels[1:2]), prompts.select([1]))
    torch.testing.assert_close(found[2:], alone, rtol=1e-5, atol=1e-6)


def test_the_rule_for_real_models_takes_them_by_the_place_of_their_weights(folder):
    config = load_config("truncated_bp/shapes-sd3", [f"rewards={{pickscore@{folder}: 1.0}}", "eval_rewards=[]"])
    assert catalog.find(next(iter(config.rewards))).differentiable


def test_missing_weights_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    other = tmp_path / "other.pt"
    torch.save({"state_dict": {"a": torch.zeros(1)}}, other)
    for name, expected in (
        ("pickscore", "yuvalkirstain/PickScore_v1 is not in the hub's cache and cannot be fetched; give a folder"),
        (
            "hpsv2",
            "xswu/HPSv2 is not in the hub's cache and cannot be fetched; give the file HPS_v2_compressed.pt as hpsv2@PLACE",
        ),
        ("clipscore@some/clip", "some/clip is not in the hub's cache and cannot be fetched; give a folder"),
        (f"pickscore@{tmp_path / 'nowhere'}", "nowhere is no folder; allowed is a folder as the hub lays it out"),
        (f"clipscore@{tmp_path}", f"{tmp_path} holds no CLIP model as the hub lays it out"),
        (f"hpsv2@{tmp_path}", f"{tmp_path} is no file; allowed is the file HPS_v2_compressed.pt"),
        (f"hpsv2@{other}", f"{other} does not hold the weights of a"),
    ):
        if str(other) in name:
            place = other.parent / "tiny-hps.json"
            place.write_text(json.dumps(TINY))
            open_clip.add_model_config(place)
            monkeypatch.setattr(hpsv2.HPSv2, "architecture", "tiny-hps")
        with pytest.raises(UserError) as caught:
            load(name)
        assert expected in str(caught.value), name


def test_places_that_are_not_there_are_named_all_at_once():
    with pytest.raises(UserError) as caught:
        load_config("truncated_bp/shapes-sd3", ["rewards={pickscore@/nope: 1.0}", "eval_rewards=[hpsv2@/none]"])
    assert caught.value.problems == (
        "rewards: pickscore@/nope: /nope is not there; allowed is a file, a folder or a hub id",
        "eval_rewards: hpsv2@/none: /none is not there; allowed is a file, a folder or a hub id",
    )


def test_the_check_sees_random_weights_and_another_tokenizer(folder, checkpoint, monkeypatch):
    monkeypatch.setattr(hpsv2.HPSv2, "architecture", "tiny-hps")
    unordered = {name: replace(entry, ordered=False) for name, entry in catalog.builtin().items()}
    monkeypatch.setattr(catalog, "builtin", lambda: unordered)  # random weights may put the right picture first
    for name in (f"pickscore@{folder}", f"hpsv2.1@{checkpoint.path}"):
        with pytest.raises(Fault, match=r"its logit scale is 14.3, a trained CLIP's is about 100: random weights\?"):
            check(name)
    monkeypatch.setattr(SimpleTokenizer, "__init__", lambda self, **more: setattr(self, "vocab_size", 2))
    _clip._tokenizer.cache_clear()
    with pytest.raises(ValueError, match="open_clip's tokenizer knows 2 tokens, CLIP's has 49408"):
        _clip.tokens(["a"])
    _clip._tokenizer.cache_clear()


@pytest.mark.parametrize("name", ["pickscore", "hpsv2.1"])
def test_checkpointing_keeps_scores_and_gradients_and_little_else(name, folder, checkpoint, monkeypatch):
    monkeypatch.setattr(hpsv2.HPSv2, "architecture", "tiny-hps")
    reward = load(f"{name}@{checkpoint.path if name.startswith('hps') else folder}")
    media, prompts = given()
    found, kept = [], []
    for _ in range(2):
        sizes: list[int] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.numel()), t)[1], lambda t: t)
        pixels = media.pixels.clone().requires_grad_()
        with hooks:
            value = reward(Media(pixels), prompts)
        found.append((value.detach(), torch.autograd.grad(value.sum(), pixels)[0]))
        kept.append(sum(sizes))
        reward.checkpoint()
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)
    assert kept[1] < 0.75 * kept[0]  # of two layers


@pytest.mark.parametrize("wanted", [True, False])
def test_a_run_asks_its_rewards_for_checkpointing(wanted, folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(_clip.Towers, "checkpoint", lambda self: asked.append(self))
    settings = tiny_config(
        tmp_path / "run",
        f"rewards={{clipscore@{folder}: 1.0}}",
        "eval_rewards=[]",
        f"memory.checkpoint={'spans' if wanted else 'none'}",
    )
    build(settings)
    assert len(asked) == wanted


def test_a_pickle_with_code_in_it_is_not_run(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    path = tmp_path / "HPS_v2_compressed.pt"
    path.write_bytes(pickle.dumps({"state_dict": Evil()}))
    with pytest.raises(UserError, match="is not HPS_v2_compressed.pt: no tensors under state_dict"):
        load(f"hpsv2@{path}")


@pytest.mark.parametrize(("frames", "seen"), [(1, [0]), (5, [0, 1, 3, 4])])
def test_diversity_is_the_mean_over_pairs_of_a_group(frames, seen, folder):
    """Groups 7 and 2 among one another, against cosines of transformers' own features, pair by pair."""
    reward = load(f"diversity_clip@{folder}")
    reward.sizes = (3, 2)
    pixels, groups = (
        torch.rand(5, frames, 3, 32, 32, generator=torch.Generator().manual_seed(3)),
        np.array([7, 2, 7, 7, 2]),
    )
    keys = np.arange(5)
    found = reward(Media(pixels), Prompts([""] * 5, groups, keys, keys, [{}] * 5))
    net = CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        vectors = [
            [net.get_image_features(_clip.normalised(shot[k : k + 1])).pooler_output[0] for k in seen]
            for shot in pixels
        ]

    def apart(i, j):
        return np.mean(
            [1 - float(F.cosine_similarity(a, b, dim=0)) for a, b in zip(vectors[i], vectors[j], strict=True)]
        )

    expected = [
        (apart(0, 2) + apart(0, 3)) / 2, apart(1, 4), (apart(2, 0) + apart(2, 3)) / 2, (apart(3, 0) + apart(3, 2)) / 2, apart(4, 1),
    ]  # fmt: skip
    assert found == pytest.approx(expected, abs=1e-6)  # float32 cosines near 1
    nearest = load(f"novelty_clip@{folder}")
    nearest.sizes = (3, 2)
    found = nearest(Media(pixels), Prompts([""] * 5, groups, keys, keys, [{}] * 5))
    alone = [min(apart(i, j) for j in range(5) if j != i and groups[j] == groups[i]) for i in range(5)]
    assert found == pytest.approx(alone, abs=1e-6)
    reward.sizes = (3,)
    with pytest.raises(Fault, match="compares the samples of a group and got one of 2; allowed is 3"):
        reward(Media(pixels), Prompts([""] * 5, groups, keys, keys, [{}] * 5))


def test_a_place_is_for_rewards_with_weights():
    with pytest.raises(
        LookupError,
        match="is for rewards with weights: aesthetic, clipscore, diversity_clip, novelty_clip, dsg, geneval_like, geneval_like_partial, "
        "hpsv2, hpsv2.1, hpsv3, imagereward, pickscore, q_realign, q_realign_aesthetic, soft_tifa, soft_tifa_am, videoreward, "
        "videoreward_vq, videoreward_mq, videoreward_ta, vlm_ask, vlm_judge, vlm_points",
    ):
        catalog.find("soft_colour@here")


def test_what_is_not_installed_is_named_with_its_command(monkeypatch):
    catalog.builtin()  # which looks for its own modules once
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "open_clip" else there(name))
    with pytest.raises(UserError, match=r"rewards: pickscore needs open_clip; pip install 'diffalign\[rewards\]'"):
        load_config("truncated_bp/shapes-sd3", ["rewards={pickscore: 1.0}"])


def head(seed: int = 0) -> dict[str, torch.Tensor]:
    """The aesthetic predictor's layers as its checkpoint names them, after a CLIP of width 16."""
    generator = torch.Generator().manual_seed(seed)
    sizes = dict(zip((0, 2, 4, 6, 7), ((8, 16), (6, 8), (5, 6), (4, 5), (1, 4)), strict=True))
    made = {f"layers.{k}.weight": torch.randn(shape, generator=generator) for k, shape in sizes.items()}
    return made | {f"layers.{k}.bias": torch.randn(shape[0], generator=generator) for k, shape in sizes.items()}


@pytest.mark.parametrize("file", ["sac+logos+ava1-l14-linearMSE.pth", "aesthetic-model.pth"])
def test_aesthetic_is_its_authors_network_on_unit_embeddings(folder, tmp_path, file):
    """Their class is a Sequential of linear layers with dropout between, which an evaluation leaves out."""
    place = tmp_path / "aesthetic"
    shutil.copytree(folder, place)
    torch.save(head(), place / file)
    published = torch.nn.Sequential(
        torch.nn.Linear(16, 8),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(8, 6),
        torch.nn.Dropout(0.2),
        torch.nn.Linear(6, 5),
        torch.nn.Dropout(0.1),
        torch.nn.Linear(5, 4),
        torch.nn.Linear(4, 1),
    ).eval()
    published.load_state_dict({key.removeprefix("layers."): value for key, value in head().items()})
    media, prompts = given()
    net = CLIPModel.from_pretrained(folder).eval()
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    with torch.no_grad():
        pooled = net.vision_model(**processor(pictures(media), return_tensors="pt")).pooler_output
        expected = published(F.normalize(net.visual_projection(pooled), dim=-1))[:, 0]
    reward = load(f"aesthetic@{place}")
    found = reward(media, prompts)
    # The reference resizes pictures of 8 bits; this random head makes 40 of what differs.
    torch.testing.assert_close(found, expected, rtol=0, atol=40 * 3e-3)
    assert float(expected.std()) > 5 * 40 * 3e-3
    pixels = media.pixels.clone().requires_grad_()
    (slope,) = torch.autograd.grad(reward(Media(pixels), prompts).sum(), pixels)
    assert slope.abs().max() > 0


def test_aesthetic_without_its_head_says_what_is_missing(folder, tmp_path):
    with pytest.raises(UserError, match="holds neither sac.logos.ava1-l14-linearMSE.pth nor aesthetic-model.pth"):
        load(f"aesthetic@{folder}")
    place = tmp_path / "aesthetic"
    shutil.copytree(folder, place)
    torch.save({"a": torch.zeros(1)}, place / "aesthetic-model.pth")
    with pytest.raises(UserError, match="it lacks its five layers"):
        load(f"aesthetic@{place}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hpsv2.1", "pickscore"])
def test_full_size_weights_load_as_published_and_score(name, tmp_path):
    """ViT-H-14, 986 M random parameters: HPSv2's file, and PickScore's folder, in half precision as on the hub; scores and gradient."""
    torch.manual_seed(0)
    if name == "hpsv2.1":
        place = tmp_path / "HPS_v2.1_compressed.pt"
        net = open_clip.create_model("ViT-H-14", pretrained=None)
        torch.save(
            {"state_dict": {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}}, place
        )
    else:
        place = tmp_path
        large = {"hidden_act": "gelu", "projection_dim": 1024}
        net = CLIPModel(
            CLIPConfig(
                text_config={
                    **large, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
                    "vocab_size": 49408, "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1,
                },
                vision_config={
                    **large, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
                    "patch_size": 14, "image_size": 224,
                },
                projection_dim=1024,
            )
        )  # fmt: skip
        net.half().save_pretrained(place)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(986.1e6, rel=1e-3)
    del net
    reward = load(f"{name}@{place}")
    media, prompts = given(side=(256, 256))
    pixels = media.pixels[:2].clone().requires_grad_()
    reward.checkpoint()
    scores = reward(Media(pixels), prompts.select([0, 1]))
    (slope,) = torch.autograd.grad(scores.sum(), pixels)
    assert scores.isfinite().all()
    assert slope.isfinite().all()
    assert slope.abs().max() > 0
    again = reward(Media(pixels.detach()[:1]), prompts.select([0]))
    torch.testing.assert_close(again, scores.detach()[:1], rtol=1e-3, atol=1e-4)


LEARNED = ("pickscore", "clipscore", "hpsv2.1")


def placed(name, folder, checkpoint, monkeypatch):
    if name.startswith("hps"):
        monkeypatch.setattr(hpsv2.HPSv2, "architecture", "tiny-hps")
        return load(f"{name}@{checkpoint.path}")
    return load(f"{name}@{folder}")


@pytest.mark.parametrize("name", LEARNED)
def test_m22_a_judge_in_bfloat16_is_near_and_has_a_gradient(name, folder, checkpoint, monkeypatch):
    """Both have 8 binary digits: a score in [-1, 1] times its scale moves by less than one step of that. Held in float32, so that
    differences of two pictures are finer than that step."""
    media, prompts = given()
    wide, narrow = placed(name, folder, checkpoint, monkeypatch), Narrow(placed(name, folder, checkpoint, monkeypatch))
    assert {p.dtype for net in narrow.networks() for p in net.parameters()} == {torch.bfloat16}
    apart, spread = difference(narrow, wide, media, prompts)
    scale = float(wide(Media(media.pixels), prompts).abs().max())
    assert 0 < apart < 2**-6 * max(scale, 1)
    assert spread > 0
    pixels = media.pixels.clone().requires_grad_()
    scores = narrow(Media(pixels), prompts)
    assert scores.dtype == torch.float32
    (slope,) = torch.autograd.grad(scores.sum(), pixels)
    assert slope.isfinite().all() and slope.abs().max() > 0
    assert {p.dtype for net in wide.networks() for p in net.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", LEARNED)
def test_m22_judges_that_rest_score_the_same_and_leave_the_device(name, folder, checkpoint, monkeypatch):
    media, prompts = given()
    reward = placed(name, folder, checkpoint, monkeypatch)
    moved = []
    for net in reward.networks():
        own = net.to
        monkeypatch.setattr(net, "to", lambda *args, own=own: moved.append(str(args[0])) or own(*args))
    with torch.no_grad():
        before = reward(media, prompts)
        Scorer({name: reward}, offload=True).rest()
        assert torch.equal(reward(media, prompts), before)
    assert moved == ["cpu"] * 3  # called, at rest, called


def test_training_is_judged_in_bfloat16_and_evaluations_in_float32(folder, tmp_path, capsys):
    settings = tiny_config(
        tmp_path / "run",
        f"rewards={{pickscore@{folder}: 1.0}}",
        "eval_rewards=[]",
        "memory.judge_precision=bfloat16",
        "updates=1",
    )
    train(settings)
    said = capsys.readouterr()
    assert "in bfloat16: scores of " in said.out + said.err
    parts = build(settings, lambda line: None)
    for scorer, dtype in ((parts.scorer, torch.bfloat16), (parts.judges, torch.float32)):
        (reward,) = scorer.rewards.values()
        assert {p.dtype for net in reward.networks() for p in net.parameters()} == {dtype}


def test_judges_that_are_offloaded_are_on_the_device_one_at_a_time(folder, checkpoint, monkeypatch):
    media, prompts = given()
    there, rewards = set(), {name: placed(name, folder, checkpoint, monkeypatch) for name in LEARNED}
    most = []
    for name, reward in rewards.items():

        def rest(name=name):
            there.discard(name)

        def ask(media, prompts, name=name, own=reward.networks):
            there.add(name)
            most.append(len(there))
            return torch.zeros(len(prompts))

        fake = type("Fake", (Wrapped,), {"networks": lambda self: [torch.nn.Identity()]})(ask)
        fake.rest = rest
        rewards[name] = fake
    scorer = Scorer(rewards, offload=True)
    for _ in range(2):
        scorer.scores(media, prompts)
    assert most == [1] * 6
    scorer.rest()
    assert not there
    resident = Scorer(rewards)
    resident.scores(media, prompts)
    resident.rest()
    assert len(there) == 3
