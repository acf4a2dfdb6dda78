"""Adapters in predictions, and the best of many: against what the pipelines' own predictions add up to."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.models import loading, lora
from diffalign.rewards.picking import judge
from diffalign.sampling import calling, pictures
from diffalign.sampling.mixing import Mixed
from diffalign.sampling.shots import best
from diffalign.sampling.sources import Source
from diffalign.shapes import captions
from tests.families import FAMILIES, folder
from tests.kit.commands import diffalign

# Both predictions in one call, in one call of lists, in two calls, by two networks.
KINDS = ["SD 3.5 Medium", "SDXL", "Wan 2.1", "Z-Image", "CogView4", "Wan 2.2"]


def pipeline(name):
    """A tiny pipeline with two adapters, "a" and "b"."""
    pipe, _ = loading.load(str(folder(name)), torch.float32, "cpu")
    networks = lora.denoisers(pipe)
    for index, adapter in enumerate(("a", "b")):
        lora.attach(pipe, 4, 8, None, index)
        for layer in lora.layers(pipe):
            for half in (layer.lora_A, layer.lora_B):
                g = torch.Generator().manual_seed(index)
                half["default"].weight.data = torch.randn(half["default"].weight.shape, generator=g) * 0.3
                half[adapter] = half.pop("default")
            for numbers in (layer.scaling, layer.r, layer.lora_alpha, layer.use_dora, layer.use_rslora):
                if "default" in numbers:
                    numbers[adapter] = numbers.pop("default")
            layer.lora_dropout[adapter] = layer.lora_dropout.pop("default")
        for network in networks.values():
            network.peft_config.pop("default", None)
    return pipe


def call_of(name, guidance):
    call = {**FAMILIES[name].call, "num_inference_steps": 2}
    if "true_cfg_scale" in call or name == "Qwen-Image":
        return {**call, "true_cfg_scale": guidance, "negative_prompt": "dull"}
    return {**call, "guidance_scale": guidance}


def first(pipe, name, guidance, mixed=None, prompts=("two stars", "a circle")):
    """What the scheduler is given at the first step of two pictures."""
    source = Source(name, (), call_of(name, guidance))
    seen = []
    step = pipe.scheduler.step

    def looked(model_output, *args, **kwargs):
        seen.append(model_output.clone())
        return step(model_output, *args, **kwargs)

    pipe.scheduler.step = looked
    try:
        draw = calling.drawer(pipe, source)
        (draw if mixed is None else mixed.drawing(draw))(prompts, [3, 4][: len(prompts)])
    finally:
        pipe.scheduler.step = step
    return seen[-2].double()  # Mixed looks first; two steps each


def acting(pipe, names):
    for layer in lora.layers(pipe):
        layer._active_adapter, layer._disable_adapters = names, not names


@pytest.mark.parametrize("name", KINDS[:4])
def test_predictions_are_mixed_as_the_formula_says(name):
    pipe = pipeline(name)
    alone = []
    for names in ([], ["a"], ["b"]):
        acting(pipe, names)
        alone.append(first(pipe, name, 1.0))
    none, a, b = alone
    found = first(pipe, name, 1.0, Mixed(pipe, ["a", "b"], None, {"a": 0.5, "b": -1.5}))
    assert (a - none).abs().max() > 0.01
    assert torch.allclose(found, none + 0.5 * (a - none) - 1.5 * (b - none), atol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_guidance_leads_away_from_the_other_adapters_prediction(name):
    """u + w (c - u) of u with b, c with a: from guided and unguided predictions of each alone."""
    pipe, w, off = (
        pipeline(name),
        2.5,
        0.0 if name == "Z-Image" else 1.0,
    )  # Z-Image's scale is w - 1, and its sign the other one
    guided, plain = {}, {}
    for adapter in ("a", "b"):
        acting(pipe, [adapter])
        guided[adapter], plain[adapter] = first(pipe, name, w + off - 1), first(pipe, name, off)
    expected = guided["b"] + w * (plain["a"] - plain["b"])
    acting(pipe, ["a"])
    found = first(pipe, name, w + off - 1, Mixed(pipe, ["a"], ["b"], {}))
    assert (expected - guided["a"]).abs().max() > 0.01
    assert torch.allclose(found, expected, atol=1e-3 * max(1.0, float(expected.abs().max())))
    assert pipe.scheduler.step.__name__ == "step"
    same = first(pipe, name, w + off - 1, Mixed(pipe, ["a"], ["a"], {}))
    assert torch.allclose(same, guided["a"], atol=1e-4)


def test_two_calls_of_a_guidance_that_is_rescaled_are_told_apart():
    pipe = pipeline("Qwen-Image")
    guided = {}
    for adapter in ("a", "b"):
        acting(pipe, [adapter])
        guided[adapter] = first(pipe, "Qwen-Image", 2.5)
    found = first(pipe, "Qwen-Image", 2.5, Mixed(pipe, ["a"], ["b"], {}))
    assert min((found - guided[k]).abs().max() for k in "ab") > 0.01
    assert torch.allclose(first(pipe, "Qwen-Image", 2.5, Mixed(pipe, ["a"], ["a"], {})), guided["a"], atol=1e-4)


def test_the_best_are_ordinary_pictures_of_the_highest_scores(tmp_path):
    entries = captions.captions("counting", "test")[:2]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    whole = pictures.sample("shapes-sd3", entries, 7, 5, tmp_path / "all", steps=3)
    done = diffalign("sample", "shapes-sd3", "--prompts", f"{tmp_path}/two.jsonl", "--best-of", "7", "--by", "shapes_pref", "-n", "2",
               "--seed", "5", "--steps", "3", "--out", f"{tmp_path}/best")  # fmt: skip
    assert done.returncode == 0, done.stderr
    for number, entry in enumerate(entries):
        files = [path for path in whole if path.name.startswith(f"{number:03d}_")]
        shots = [np.asarray(Image.open(path)) / 255 for path in files]
        scores = judge("shapes_pref")(shots, entry)
        wanted = [files[k].name for k in np.argsort(-scores, kind="stable")[:2]]
        kept = [p for p in (tmp_path / "best").iterdir() if p.name.startswith(f"{number:03d}_")]
        assert {path.name for path in kept} == set(wanted)
        for path in kept:
            assert path.read_bytes() == (tmp_path / "all" / path.name).read_bytes()
    assert f"{max(scores):.4g}" in (tmp_path / "best" / "index.html").read_text()


def test_equal_scores_and_none_go_by_seed():
    shots = [(4, "x", 1.0), (2, "x", float("nan")), (3, "x", 1.0), (1, "x", 0.5), (0, "x", float("nan"))]
    assert [seed for seed, *_ in best(shots, 5)] == [3, 4, 1, 0, 2]
    assert best(shots, None) is shots


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--best-of", "9"], "allowed are both"),
        (["--by", "shapes_pref"], "allowed are both"),
        (["--best-of", "3", "--by", "soft_colour"], "got 3, 4 pictures are kept of a caption; allowed is 4 and more"),
        (["--best-of", "9", "--by", "nope"], "--by: nope: unknown reward"),
        (["--best-of", "9", "--by", "diversity"], "--by: diversity compares a caption's pictures with one another"),
        (["--best-of", "9", "--by", "motion", "--steps", "1"], "--by: motion judges videos, these are pictures"),
        (["--best-of", "9", "--by", "shapes_pref", "--steps", "1"], "--by: shapes_pref needs 'include' in every"),
        (["--mix", "predictions"], "there is nothing to mix"),
        (["--negative-adapter", "nowhere"], "--negative-adapter"),
    ],
)
def test_what_cannot_be_is_one_line(given, told, tmp_path):
    done = diffalign("sample", "shapes-sd3", "--prompt", "two stars", *given, "--out", str(tmp_path / "out"))
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert not list(tmp_path.rglob("*.png"))


def test_a_pipeline_that_predicts_once_has_nothing_to_lead_away_from():
    pipe = pipeline("SD 3.5 Medium")
    acting(pipe, ["a"])
    with pytest.raises(Exception, match="--negative-adapter: no effect, StableDiffusion3Pipeline predicts once a step"):
        first(pipe, "SD 3.5 Medium", 1.0, Mixed(pipe, ["a"], ["b"], {}))
