"""Runs that learn from judges on Qwen2-VL, with tiny random weights."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffalign import config as configs
from diffalign.planning import starter
from diffalign.rewards.load import load
from diffalign.runs import session
from diffalign.runs.folder import read_rows
from diffalign.shapes.captions import Combination, caption
from diffalign.shapes.world import Object, render
from diffalign.types import Media, Prompts
from reward_models import hpsv3
from tests.kit.helpers import SMALL, THREE_STEPS
from tests.rewards import qwen

MARKS = "rewards={videoreward_vq@%s: 1.0, videoreward_mq@%s: 1.0, videoreward_ta@%s: 1.0}"
VIDEOS = {
    "flow_grpo": [],
    "truncated_bp": ["rule={name: truncated_bp, depth: 1}", "sampler.process=ode", "prompts.group_size=1"],
}


def run(name: str, folder, *overrides: str) -> dict[str, torch.Tensor]:
    """Train without evaluations; the adapter."""
    whole = [*SMALL, "evaluation.enabled=false", "eval_rewards=[]", f"run_dir={folder}", *overrides]
    session.train(configs.load(name, whole), quiet=True)
    return load_file(folder / "adapter" / "pytorch_lora_weights.safetensors")


@pytest.mark.slow
def test_hpsv3_teaches_by_its_gradient(tmp_path, monkeypatch):
    qwen.asked(monkeypatch, "hpsv3")
    place = qwen.hpsv3_folder(tmp_path / "hpsv3")
    more = ["updates=1", "prompts.group_size=1", "optimizer.micro_batch=2", "memory.checkpoint=blocks"]
    adapter = run(
        "truncated_bp/shapes-sd3",
        tmp_path / "run",
        f"rewards={{hpsv3@{place}: 1.0}}",
        *THREE_STEPS["truncated_bp"],
        *more,
    )
    (row,) = [row for row in read_rows(tmp_path / "run") if "seconds/total" in row]
    assert math.isfinite(row[f"reward/hpsv3@{place}"])
    assert row["grad_norm"] > 0
    assert max(value.abs().max() for key, value in adapter.items() if "lora_B" in key) > 0


@pytest.mark.slow
@pytest.mark.parametrize("rule", VIDEOS)
def test_videoreward_teaches_videos_and_a_resumed_run_is_the_same(rule, tmp_path, monkeypatch):
    qwen.asked(monkeypatch, "videoreward")
    place = qwen.videoreward_folder(tmp_path / "videoreward")
    more = [
        MARKS % (place, place, place),
        "sampler.fps=8",
        *THREE_STEPS["flow_grpo"],
        *VIDEOS[rule],
        "optimizer.micro_batch=2",
    ]
    whole = run("flow_grpo/shapes-wan", tmp_path / "whole", *more, "updates=2")
    run("flow_grpo/shapes-wan", tmp_path / "parts", *more, "updates=1")
    parts = run("flow_grpo/shapes-wan", tmp_path / "parts", *more, "updates=2")
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())
    rows = [row for row in read_rows(tmp_path / "whole") if "seconds/total" in row]
    assert len(rows) == 2
    for row in rows:
        marks = [row[f"reward/videoreward_{mark}@{place}"] for mark in ("vq", "mq", "ta")]
        assert row["reward/total"] == pytest.approx(sum(marks), rel=1e-4)
        assert row["grad_norm"] > 0


@pytest.mark.parametrize("model", ["Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Lightricks/LTX-Video"])
def test_init_says_how_fast_a_familys_videos_are(model, tmp_path):
    starter.write(tmp_path / "mine.yaml", model, rewards=["videoreward"])
    found = configs.load(str(tmp_path / "mine.yaml"))
    assert found.sampler.fps == {"W": 16, "L": 25}[model[0]]
    assert found.rewards == {"videoreward": 1.0}


@pytest.mark.parametrize(
    "model", ["Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "stabilityai/stable-diffusion-3.5-medium", "Lightricks/LTX-Video"]
)
def test_init_begins_with_the_preset_that_most_begin_with(model, tmp_path):
    starter.write(tmp_path / "mine.yaml", model)
    assert configs.load(str(tmp_path / "mine.yaml")).rewards == {"pickscore": 1.0}


COLOURS = ("red", "blue")


def taught(place) -> None:
    """Train the tiny judge of a folder on circles: is it of the colour that the text says?"""
    judge, rng = load(f"hpsv3@{place}").reward, np.random.default_rng(0)
    for network in judge.networks():
        network.requires_grad_(True)
    optimizer = torch.optim.Adam([p for network in judge.networks() for p in network.parameters()], lr=1e-3)
    for _ in range(110):
        wanted, drawn = rng.integers(0, 2, (2, 32))
        circles = [
            Object("circle", COLOURS[k], *rng.integers(20, 44, 2).tolist(), int(rng.integers(9, 14))) for k in drawn
        ]
        shots = np.stack([render((circle,)) for circle in circles])
        pixels = torch.from_numpy(shots).permute(0, 3, 1, 2)[:, None].float() / 255
        keys = np.arange(32)
        told = Prompts([f"a photo of a {COLOURS[k]} circle" for k in wanted], keys, keys, keys, [{}] * 32)
        right = torch.from_numpy((wanted == drawn).astype(np.float32))
        mu = judge(Media(pixels), told)
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(mu, right).backward()
        optimizer.step()
    assert float(((mu > 0) == (right > 0)).float().mean()) == 1
    held = judge.net.state_dict()
    weights = {key.replace("language_model.", "model.", 1): value.detach().contiguous() for key, value in held.items()}
    weights |= {f"rm_head.{key}": value.detach() for key, value in judge.head.state_dict().items()}
    save_file(weights, place / hpsv3.FILE)


@pytest.mark.slow
def test_j32_what_a_trained_judge_prefers_is_learned(tmp_path, monkeypatch):
    """Not that pictures get better: a judge that has seen nothing but clean circles does not mind what becomes of shapes."""
    monkeypatch.setattr(hpsv3, "TOKENS", 64)  # the pictures' own size
    qwen.asked(monkeypatch, "hpsv3")
    place = qwen.hpsv3_folder(tmp_path / "hpsv3")
    taught(place)
    lines = [caption(Combination("colors", (("circle", colour),))) for colour in COLOURS]
    (tmp_path / "mine.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    more = [
        f"rewards={{hpsv3@{place}: 1.0}}",
        "eval_rewards=[]",
        "rule={name: truncated_bp, depth: 3}",
        f"prompts={{source: {tmp_path / 'mine.jsonl'}, groups: 16, group_size: 1}}",
        "optimizer.micro_batch=16",
        "optimizer.ema=null",
        "evaluation={images_per_prompt: 32, holdout: 0}",
        "updates=15",
        f"run_dir={tmp_path / 'run'}",
    ]
    session.train(configs.load("truncated_bp/shapes-sd3", more), quiet=True)
    first, last = (row for row in read_rows(tmp_path / "run") if "eval/n" in row)
    assert last[f"eval/hpsv3@{place}"] > first[f"eval/hpsv3@{place}"]
