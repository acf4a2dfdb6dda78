"""`--export vbench`: PROMPT-INDEX.mp4, and no file for two samples, whatever the prompts."""

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from diffalign.cli import app
from diffalign.errors import UserError
from diffalign.evaluation import exporting, judging, samples, suite
from diffalign.evaluation.task import task_of
from diffalign.models.notes import LORA
from diffalign.rewards.load import load
from tests.families import folder

LONG = "a very long prompt " * 11
ODD = ["a cat", "1/2 of a cake", "1_2 of a cake", "a cat", LONG[:200], LONG + "x", LONG + "y", "é" * 130, "a\ttab"]


def test_names_are_vbenchs_and_no_two_samples_share_one():
    prompts = [prompt for prompt in ODD for _ in range(5)]
    names = exporting.file_names(prompts)
    assert len(set(names)) == len(names) == 45
    assert all(len(name.encode()) <= 255 and "/" not in name for name in names)
    assert names[:5] == [f"a cat-{k}.mp4" for k in range(5)]
    assert names[15:20] == [f"a cat-{k}.mp4" for k in range(5, 10)]  # a double goes on counting
    assert names[20] == f"{LONG[:200]}-0.mp4"  # 200 characters are a file's name as they are
    assert names[10] == "1_2 of a cake-0.mp4"
    assert names[5].startswith("1_2 of a cake~")


@pytest.fixture
def drawn(tmp_path):
    task = replace(task_of("shapes", None, ("motion",), "test", 2, 0, 4), entries=[{"prompt": p} for p in ODD[:2]])
    for row in range(4):
        frames = np.zeros((3, 16, 16, 3), np.uint8)
        frames[:, :, :8] = 60 * row
        samples.path(tmp_path / "0-m", row).parent.mkdir(exist_ok=True)
        samples.write(frames, samples.path(tmp_path / "0-m", row))
    return task, tmp_path


def test_videos_are_those_of_the_samples(drawn):
    imageio = pytest.importorskip("imageio.v3")
    task, out = drawn
    said = []
    (place,) = exporting.vbench(task, {out / "0-m": 8}, out, said.append)
    names = json.loads((place / "names.json").read_text())
    assert sorted(path.name for path in place.glob("*.mp4")) == sorted(names)
    assert list(names.values()) == ["a cat", "a cat", "1/2 of a cake", "1/2 of a cake"]
    assert "2 files have no prompt that a file can be named" in said[0]
    for row, name in enumerate(names):
        frames = imageio.imread(place / name)
        assert frames.shape == (3, 16, 16, 3)
        assert abs(float(frames[:, :, :6].mean()) - 60 * row) < 6  # of 255: chroma and compression
    before = {path: path.stat().st_mtime_ns for path in place.glob("*.mp4")}
    again = samples.path(out / "0-m", 1)
    samples.write(samples.read(out / "0-m", 2), again)
    exporting.vbench(task, {out / "0-m": 8}, out, said.append)
    changed = {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed == {"a cat-1.mp4"}  # the sample that is another


def test_pictures_are_refused(drawn):
    task, out = drawn
    samples.write(np.zeros((1, 16, 16, 3), np.uint8), samples.path(out / "0-m", 0))
    with pytest.raises(UserError, match="--export: vbench is of videos, 0-m made pictures"):
        exporting.vbench(task, {out / "0-m": 8}, out)


def test_videos_are_as_fast_as_they_were_trained_or_their_family_is(drawn, monkeypatch):
    """The command's word first, then the adapter's notes, then the family's, by the name on the hub or by the folder's files."""
    task, out = drawn
    for model, notes, given, expected in (
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", {}, None, 16),
        (str(folder("LTX-Video")), {}, None, 25),
        ("stabilityai/stable-diffusion-3.5-medium", {}, None, None),
        ("shapes-wan", {}, None, None),
        ("shapes-wan", {}, 8, 8),
        ("shapes-wan", {"fps": "12.0", "notes_format": "7"}, None, 12),
        ("Lightricks/LTX-Video", {"notes_format": "3"}, None, 25),  # written before there was such a note
        ("Lightricks/LTX-Video", {"fps": "30.0", "notes_format": "7"}, 24, 24),
    ):
        target = model
        if notes:
            target = out / "adapter"
            target.mkdir(exist_ok=True)
            save_file({"x.lora_A.weight": np.zeros((1, 2), np.float32)}, target / LORA, {"base_model": model, **notes})
        found = suite.models_of([str(target)], (), None, None, fps=given)
        assert {one.fps for one in found} == {expected}, (model, notes, given)


def test_judges_that_go_by_time_are_told_how_fast_a_models_videos_are(drawn):
    task, out = drawn
    asked = ("shapes", None, ("videoreward",), "test", 2, 0, 4)
    with pytest.raises(UserError, match="--judges: videoreward goes by time, .*; sampler.fps or --fps says it"):
        task_of(*asked)
    assert task_of(*asked, fps=16).rewards == ("videoreward",)
    (out / "mine.py").write_text("def speed(media, prompts):\n    return [media.fps or 0.0] * len(prompts.text)\n")
    name = f"{out}/mine.py:speed"
    for fps in (8.0, 24.0, None):  # each anew: what is kept is of another speed
        _, found = judging.scores(task, out / "0-m", [[0, 1], [2]], {name: load(name)}, fps)
        assert found[name].tolist() == [fps or 0.0] * 3


@pytest.mark.slow  # a quarter of a minute: a video pipeline draws
def test_the_command_writes_them(tmp_path):
    pytest.importorskip("imageio")
    (tmp_path / "p.txt").write_text("a red circle moving left\n")
    command = ["evaluate", "shapes-wan", "--suite", tmp_path / "p.txt", "--judges", "motion", "-n", "2", "--steps", "2"]
    done = CliRunner().invoke(app, [str(a) for a in (*command, "--export", "vbench", "--out", tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert len(list((tmp_path / "out" / "vbench" / "0-shapes-wan").glob("a red circle moving left-*.mp4"))) == 2
