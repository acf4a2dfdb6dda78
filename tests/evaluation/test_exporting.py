"""`--export vbench`: PROMPT-INDEX.mp4, and no file for two samples, whatever the prompts."""

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from diffalign.cli import app
from diffalign.errors import UserError
from diffalign.evaluation import exporting, samples
from diffalign.evaluation.task import task_of

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
    (place,) = exporting.vbench(task, [out / "0-m"], out, 8, said.append)
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
    exporting.vbench(task, [out / "0-m"], out, 8, said.append)
    changed = {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed == {"a cat-1.mp4"}  # the sample that is another


def test_pictures_are_refused(drawn):
    task, out = drawn
    samples.write(np.zeros((1, 16, 16, 3), np.uint8), samples.path(out / "0-m", 0))
    with pytest.raises(UserError, match="--export: vbench is of videos, 0-m made pictures"):
        exporting.vbench(task, [out / "0-m"], out, 8)


@pytest.mark.slow  # a quarter of a minute: a video pipeline draws
def test_the_command_writes_them(tmp_path):
    pytest.importorskip("imageio")
    (tmp_path / "p.txt").write_text("a red circle moving left\n")
    command = ["evaluate", "shapes-wan", "--suite", tmp_path / "p.txt", "--judges", "motion", "-n", "2", "--steps", "2"]
    done = CliRunner().invoke(app, [str(a) for a in (*command, "--export", "vbench", "--out", tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert len(list((tmp_path / "out" / "vbench" / "0-shapes-wan").glob("a red circle moving left-*.mp4"))) == 2
