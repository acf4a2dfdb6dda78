"""The benchmark for a card runs where there is none, with one layer a model, and its counts are what is allocated."""

import importlib.util
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.kit import ROOT


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset",
    [
        "flow_grpo/wan21",
        *(pytest.param(f"flow_grpo/{n}", marks=pytest.mark.slow) for n in ("sd35-medium", "z-image", "flux-dev")),
    ],
)
def test_on_a_card_runs_with_one_layer(preset, tmp_path):
    command = [sys.executable, "benchmarks/on_a_card.py", str(tmp_path / "out.json"), "--presets", preset]
    more = ["--layers", "1", "--pixels", "64", "--seconds", "240"]
    done = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert "problem" not in found, found
    # What a call takes once, LoRA in the base's precision, is counted once a row: at one layer of full width that is some MiB.
    for what in ("sample", "train", "train, blocks"):
        assert found[what]["counted_gib"] == pytest.approx(found[what]["peak_gib"], rel=0.1, abs=0.01), what
    assert found["train"]["peak_gib"] < found["train, peft's products"]["peak_gib"]
    assert f"| {preset}  | " in done.stdout


def test_a_preset_that_dies_is_a_row_that_says_so(tmp_path):
    command = [sys.executable, "benchmarks/on_a_card.py", str(tmp_path / "out.json"), "--presets", "flow_grpo/wan21"]
    subprocess.run([*command, "--seconds", "0.1"], cwd=ROOT, capture_output=True, check=True)
    (found,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert found["problem"] == "took longer than 0.1 s"


def test_the_page_has_the_table_of_the_result():
    results = ROOT / "benchmarks" / "results" / "on_a_card.json"
    command = [sys.executable, "benchmarks/on_a_card.py", "--table", str(results)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    page = (ROOT / "docs" / "on-a-card.md").read_text()
    assert done.stdout.strip() in page
    for row in json.loads(results.read_text())["updates"]["rows"]:
        assert f"| {row['memory.checkpoint']} | {row['speed']} | {row['sample_s']:.2f} | {row['train_s']:.2f} |" in page


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("way", ["update", "row"])
def test_what_a_draw_of_levels_adds_to_the_variance_is_that_over_all_draws(way, times):
    spec = importlib.util.spec_from_file_location("levels_per_row", ROOT / "benchmarks" / "levels_per_row.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    gradients = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))  # samples, levels, parameters
    update = script.Update(4, np.random.default_rng(0))
    for own in gradients:
        update.add(own)
    draws = [list(rows) for rows in itertools.combinations(range(4), times)]
    shared = way == "update"
    every = [[rows] * 3 for rows in draws] if shared else itertools.product(draws, repeat=3)
    means = torch.stack(
        [torch.stack([gradients[k, own].mean(0) for k, own in enumerate(rows)]).mean(0) for rows in every]
    )
    assert update.added(way, times) == pytest.approx(float(means.var(0, correction=0).sum()), rel=1e-5)
    torch.testing.assert_close(means.mean(0), update.mean(), rtol=1e-5, atol=1e-6)
    seen = update.gradients(way, times)
    assert ((seen[:, None] - means).norm(dim=2).min(1).values < 1e-5).all()  # each of them is one of these
