"""`diffalign evaluate`: the same noises for all, files that are made once, scores that are given once, a report."""

import json
import shutil
import sqlite3
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import DiffusionPipeline
from PIL import Image

from diffalign.cli import app
from diffalign.errors import Fault, UserError
from diffalign.evaluation import samples
from diffalign.evaluation.task import task_of
from diffalign.runs import session
from diffalign.sampling import calling
from diffalign.shapes import captions, models
from tests.kit.helpers import tiny_config
from tests.kit.processes import launch

FEW = ["--steps", "3", "-n", "2", "--batch", "3"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    place = tmp_path_factory.mktemp("prompts") / "few.jsonl"
    chosen = [captions.captions(task, "test")[0] for task in ("colors", "counting", "color_attr")]
    place.write_text("".join(json.dumps(entry) + "\n" for entry in chosen))
    return place


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose adapter changes the pictures visibly."""
    folder = tmp_path_factory.mktemp("run") / "tuned"
    loud = ["optimizer.lr=0.3", "optimizer.ema=null", "rewards={jpeg_compressibility: 1.0}"]
    session.train(tiny_config(folder, "evaluation.enabled=false", *loud), quiet=True)
    return folder


def invoke(*arguments):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


@pytest.fixture(scope="module")
def out(prompts, run, tmp_path_factory):
    place = tmp_path_factory.mktemp("evaluation") / "out"
    done = invoke(
        run, "--suite", prompts, "--judges", "shapes_geneval", "--judges", "jpeg_compressibility", *FEW, "--out", place
    )
    assert done.exit_code == 0, done.output
    assert str(place / "index.html") in done.output
    return place


def test_diversity_is_of_whole_prompts_and_paired_with_the_base(prompts, run, tmp_path):
    """Against distances of thumbnails made otherwise: by resizing whole pictures, whose sides are multiples of 16. What is drawn
    by fours, with three samples a prompt, is scored by prompts."""
    more = tmp_path / "more.jsonl"
    more.write_text("".join(json.dumps({"prompt": f"a red circle {k}"}) + "\n" for k in range(9)))
    few = ["--steps", "2", "-n", "3", "--batch", "4", "--no-drift", "--out", tmp_path / "out"]
    judged = invoke(run, "--suite", "diversity", "--prompts", more, "--judges", "diversity,jpeg_compressibility", *few)
    assert judged.exit_code == 0, judged.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["comparable"].startswith("Comparable within one report")
    means = []
    for row in report["models"]:
        files = sorted((tmp_path / "out" / row["label"]).glob("*.png"))
        small = [
            np.asarray(Image.open(file).resize((16, 16), Image.Resampling.BOX, reducing_gap=None)) for file in files
        ]
        flat = np.stack(small).reshape(9, 3, -1) / 255
        pairs = [np.sqrt(np.mean((flat[:, i] - flat[:, j]) ** 2, 1)) for i, j in ((0, 1), (0, 2), (1, 2))]
        means.append(np.mean(pairs))
        found = row["scores"]["diversity"]
        assert found["mean"]["mean"] == pytest.approx(means[-1], abs=0.002)  # of 8 bits, rounded
        assert found["mean"]["mean"] == pytest.approx(row["diversity"]["mean"], rel=1e-9)
        assert found["mean"]["low"] < means[-1] < found["mean"]["high"]
    gain = report["models"][1]["scores"]["diversity"]["gain"]
    assert gain["mean"] == pytest.approx(means[1] - means[0], abs=0.003)
    assert gain["low"] is not None
    alone = invoke(
        run, "--suite", "diversity", "--prompts", more, "--judges", "diversity", "-n", "1", "--out", tmp_path / "a"
    )
    assert list(alone.exception.problems) == [
        "--judges: diversity compares the samples of a prompt, got one alone; allowed is -n 2 or more"
    ]


def test_base_and_aligned_are_judged_from_the_same_noises(out, prompts):
    report = json.loads((out / "report.json").read_text())
    assert [row["label"] for row in report["models"]] == ["0-shapes-sd3", "1-tuned"]
    base, tuned = report["models"]
    assert base["adapters"] == []
    assert "tuned" in tuned["adapters"][0]
    assert set(base["scores"]["shapes_geneval"]["by"]["tag"]["parts"]) == {"colors", "counting", "color_attr"}
    assert tuned["drift"]["mean"] > 0.01
    assert tuned["prediction_drift"]["mean"] > 0.01
    assert "prediction_drift" not in base
    assert base["diversity"]["mean"] > 0.01
    lines = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 3 * 2
    for name, row in (("0-shapes-sd3", base), ("1-tuned", tuned)):
        for reward in report["rewards"]:
            values = [line["scores"][reward] for line in lines if line["model"] == name]
            assert row["scores"][reward]["mean"]["mean"] == pytest.approx(np.mean(values))
    gain = tuned["scores"]["jpeg_compressibility"]["gain"]["mean"]
    means = [row["scores"]["jpeg_compressibility"]["mean"]["mean"] for row in (base, tuned)]
    assert gain == pytest.approx(means[1] - means[0])
    assert "gain" not in base["scores"]["shapes_geneval"]
    both = [row["scores"]["jpeg_compressibility"] for row in (base, tuned)]
    tags = [found["by"]["tag"] for found in both]
    of_tags = [np.mean([part["mean"]["mean"] for part in tag["parts"].values()]) for tag in tags]
    assert tags[1]["gain"]["mean"] == pytest.approx(of_tags[1] - of_tags[0])
    assert tags[1]["gain"]["low"] is None  # one prompt a tag
    assert [line["seed"] for line in lines[:6]] == [line["seed"] for line in lines[6:]]
    assert len({line["seed"] for line in lines}) == 6
    page = (out / "index.html").read_text()
    assert "(too few prompts for an interval)" in page
    assert '"folder": "0-shapes-sd3"' in page
    assert "1-tuned" in page
    with Image.open(out / "grid.png") as grid:
        assert grid.size[1] > grid.size[0]  # six rows of two


def test_a_sample_is_what_the_plain_pipeline_gives(out):
    line = json.loads((out / "scores.jsonl").read_text().splitlines()[3])
    call = json.loads((out / "manifest.json").read_text())["models"]["0-shapes-sd3"]["call"]
    pipe = DiffusionPipeline.from_pretrained(models.path("shapes-sd3"))
    shot = pipe([line["prompt"]], **call, generator=[torch.Generator().manual_seed(line["seed"])], output_type="np")
    kept = np.asarray(Image.open(out / line["file"]))
    assert np.abs(kept.astype(int) - np.round(shot.images[0] * 255)).max() <= 1  # batches of three round otherwise


def counting(folder):
    """A reward that notes how many samples it was asked for."""
    (folder / "counted.py").write_text(
        "from pathlib import Path\n"
        "def mean(media, prompts):\n"
        "    with (Path(__file__).parent / 'asked').open('a') as file:\n"
        "        file.write('x' * len(prompts))\n"
        "    return [float(v) for v in media.pixels.flatten(1).mean(1)]\n"
    )
    return folder / "counted.py", folder / "asked"


def test_what_is_there_is_neither_drawn_nor_judged_again(prompts, tmp_path):
    reward, asked = counting(tmp_path)
    command = ["shapes-sd3", "--suite", prompts, "--judges", f"{reward}:mean", *FEW, "--out", tmp_path / "out"]
    assert invoke(*command).exit_code == 0
    assert len(asked.read_text()) == 6
    folder = tmp_path / "out" / "0-shapes-sd3"
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("*.png")}
    first = (tmp_path / "out" / "report.json").read_text()
    (folder / "000004.png").unlink()
    again = invoke(*command)
    assert "6 samples, 1 of them to draw" in again.output
    assert len(asked.read_text()) == 6  # drawn among the same, it has the same pixels and the same score
    after = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("*.png")}
    assert {name for name in before if before[name][1] != after[name][1]} == {"000004.png"}
    assert all(before[name][0] == after[name][0] for name in before)
    assert (tmp_path / "out" / "report.json").read_text() == first
    reward.write_text(reward.read_text() + "# changed\n")
    assert invoke(*command).exit_code == 0
    assert len(asked.read_text()) == 12  # another version
    assert invoke(*command, "--fresh").exit_code == 0
    assert {path.stat().st_mtime_ns for path in folder.glob("*.png")}.isdisjoint(v[1] for v in after.values())


def drawn_together(monkeypatch):
    """Pictures that depend on how many are drawn at once, as they do in their last bits on processors without AVX-512."""
    plain = calling.shots

    def shots(pipe, run, call, prompts, seeds):
        return np.clip(plain(pipe, run, call, prompts, seeds) * (1 - 0.1 * len(prompts)), 0, 1)

    monkeypatch.setattr(calling, "shots", shots)


def test_a_lost_picture_is_drawn_again_among_those_it_came_from(prompts, tmp_path, monkeypatch):
    drawn_together(monkeypatch)
    command = ["shapes-sd3", "--suite", prompts, "--judges", "jpeg_compressibility", *FEW, "--out", tmp_path]
    assert invoke(*command).exit_code == 0
    lost = tmp_path / "0-shapes-sd3" / "000004.png"
    before = lost.read_bytes()
    lost.unlink()
    assert "6 samples, 1 of them to draw" in invoke(*command).output
    assert lost.read_bytes() == before
    assert json.loads((tmp_path / "report.json").read_text())["drawn_at_once"] == [3]
    assert "at a time" not in (tmp_path / "index.html").read_text()
    lost.unlink()
    assert invoke(*command[:-3], "2", *command[-2:]).exit_code == 0  # --batch 2
    assert "drawn 2 and 3 at a time" in (tmp_path / "index.html").read_text()


def test_a_failure_is_not_kept(prompts, tmp_path):
    (tmp_path / "half.py").write_text(
        "def some(media, prompts):\n    return [float('nan') if 'a' in p[:1] else 1.0 for p in prompts.text]\n"
    )
    command = [
        "shapes-sd3",
        "--suite",
        prompts,
        "--judges",
        f"{tmp_path}/half.py:some",
        *FEW,
        "--out",
        tmp_path / "out",
    ]
    done = invoke(*command)
    assert isinstance(done.exception, Fault)
    assert str(done.exception).startswith("0-shapes-sd3: samples without a score, ")
    assert "half.py:some: 6 of 6; allowed are 5%" in str(done.exception)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (scores,) = report["models"][0]["scores"].values()
    assert scores["unscored"] == 6
    assert sqlite3.connect(tmp_path / "out" / "scores.sqlite").execute("SELECT COUNT(*) FROM signed").fetchone() == (0,)
    assert "NaN" not in (tmp_path / "out" / "scores.jsonl").read_text()


def test_drift_that_was_left_out_is_measured_when_asked_for(prompts, run, tmp_path):
    command = [run, "--suite", prompts, "--judges", "jpeg_compressibility", *FEW, "--out", tmp_path / "out"]
    assert invoke(*command, "--no-drift").exit_code == 0
    assert "prediction_drift" not in (tmp_path / "out" / "report.json").read_text()
    done = invoke(*command)
    assert "0-shapes-sd3: 6 samples, 0 of them to draw" in done.output
    assert "1-tuned: 6 samples, 6 of them to draw" in done.output
    assert "prediction_drift" in (tmp_path / "out" / "report.json").read_text()


def test_models_of_several_sizes_share_a_page(tmp_path):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "a red circle moving left"}\n')
    (tmp_path / "mine.py").write_text("def mean(media, prompts):\n    return media.pixels.flatten(1).mean(1)\n")
    command = [
        "shapes-wan",
        "shapes-sd3",
        "--suite",
        prompts,
        "--judges",
        f"{tmp_path}/mine.py:mean",
        "--steps",
        "2",
        "-n",
        "2",
    ]
    done = invoke(*command, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.size[0] >= 2 * 160
    place = samples.path(tmp_path / "out" / "1-shapes-sd3", 1)
    Image.new("RGB", (16, 16)).save(place)
    again = invoke(*command, "--out", tmp_path / "out")
    assert isinstance(again.exception, Fault)
    assert "000001.png: damaged (its size is" in str(again.exception)


def test_a_damaged_evaluation_is_named_and_fresh_mends_it(prompts, tmp_path):
    command = ["shapes-sd3", "--suite", prompts, "--judges", "jpeg_compressibility", *FEW, "--out", tmp_path / "out"]
    assert invoke(*command).exit_code == 0
    (tmp_path / "out" / "scores.sqlite").write_text("garbage " * 1000)
    done = invoke(*command)
    assert isinstance(done.exception, Fault)
    assert "scores.sqlite: damaged (DatabaseError: file is not a database); delete it" in str(done.exception)
    (tmp_path / "out" / "manifest.json").write_text("[]")
    done = invoke(*command)
    assert isinstance(done.exception, UserError)
    assert "manifest.json is damaged (ValueError: it lacks its models); choose another folder, or --fresh" in str(
        done.exception
    )
    assert invoke(*command, "--fresh").exit_code == 0


def test_fresh_leaves_nothing_of_other_models(prompts, run, out, tmp_path):
    place = tmp_path / "copy"
    shutil.copytree(out, place)
    done = invoke("shapes-sd3", "--suite", prompts, "--judges", "jpeg_compressibility", *FEW, "--out", place, "--fresh")
    assert done.exit_code == 0, done.output
    assert sorted(path.parent.name for path in place.glob("*/*.png")) == ["0-shapes-sd3"] * 6


def test_a_judge_that_is_refused_neither_claims_a_folder_nor_deletes_what_is_there(prompts, run, out, tmp_path):
    command = ["shapes-sd3", "--suite", prompts, "--judges", "novelty", "--steps", "3", "-n", "1"]
    for place in (tmp_path / "new", Path(shutil.copytree(out, tmp_path / "copy"))):
        before = sorted(path.name for path in place.rglob("*")) if place.is_dir() else []
        done = invoke(*command, "--out", place, "--fresh")
        assert "novelty compares the samples of a prompt, got one alone" in str(done.exception)
        assert sorted(path.name for path in place.rglob("*")) == before


@pytest.mark.parametrize("wrong", [["--set", "foo=1"], ["--steps", "0"]])
def test_a_mistake_that_a_model_finds_deletes_nothing(prompts, out, tmp_path, wrong):
    place = Path(shutil.copytree(out, tmp_path / "copy"))
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    command = ["shapes-sd3", "--suite", prompts, "--judges", "jpeg_compressibility", *FEW, *wrong, "--out", place]
    assert isinstance(invoke(*command, "--fresh").exception, (UserError, SystemExit))
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


def test_a_mistake_that_a_model_finds_does_not_claim_the_folder(prompts, tmp_path):
    command = ["shapes-sd3", "--suite", prompts, "--judges", "jpeg_compressibility", *FEW, "--out", tmp_path / "out"]
    done = invoke(*command, "--set", "foo=1")
    assert isinstance(done.exception, UserError)
    assert invoke(*command).exit_code == 0


@pytest.mark.wide
def test_several_processes_give_the_same_report(prompts, out, run, tmp_path):
    command = ["-m", "diffalign", "evaluate", str(run), "--suite", str(prompts), "--out", str(tmp_path / "two"), *FEW]
    done = launch(2, [*command, "--judges", "shapes_geneval", "--judges", "jpeg_compressibility"])
    assert [process.returncode for process in done] == [0, 0], done
    assert (tmp_path / "two" / "report.json").read_text() == (out / "report.json").read_text()
    assert str(tmp_path / "two" / "index.html") in done[0].stdout
    assert done[1].stdout == ""


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            ["shapes-sd3", "--suite", "shaps"],
            "--suite: got 'shaps', which is no file; allowed are shapes, shapes-motion",
        ),
        (["shapes-sd3", "--suite", "{prompts}"], "--judges: none given; a file of prompts needs one at least"),
        (["shapes-sd3", "--suite", "shapes", "--judges", "pickscor"], "did you mean pickscore"),
        (["shapes-sd3", "--suite", "shapes", "--judges", "shapes_motion"], "needs 'motion' in every prompt's metadata"),
        (["shapes-sd3", "--suite", "pickscore"], "--prompts: the suite pickscore needs some"),
        (["nowhere", "--suite", "shapes"], "which is no run, adapter, model folder or hub id"),
        (["tests/nowhere", "--suite", "shapes"], "which is no run, adapter, model folder or hub id"),
        (["shapes-sd3", "--suite", "shapes", "--set", "height"], "allowed is KEY=VALUE"),
    ],
)
def test_bad_input_is_refused_before_anything_loads(arguments, problem, prompts, tmp_path, capsys):
    given = [argument.format(prompts=prompts) for argument in arguments]
    with pytest.raises(UserError, match=problem):
        app(["evaluate", *given, "--out", str(tmp_path / "out")], standalone_mode=False)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_not_written_into(prompts, out, tmp_path):
    def evaluate(*arguments):
        app(["evaluate", "shapes-sd3", "--suite", str(prompts), *map(str, arguments)], standalone_mode=False)

    one = ["--judges", "jpeg_compressibility"]
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files; choose another folder"):
        evaluate(*one, "--out", tmp_path)
    with pytest.raises(
        UserError, match="holds an evaluation with other samples, models; choose another folder, or --fresh"
    ):
        evaluate(*one, "--out", out)
    assert (out / "1-tuned" / "000005.png").is_file()


def test_a_damaged_sample_is_named(tmp_path):
    samples.write(np.zeros((2, 4, 6, 3), np.uint8), samples.path(tmp_path, 7))
    assert samples.read(tmp_path, 7).shape == (2, 4, 6, 3)
    samples.path(tmp_path, 7).write_bytes(b"no picture")
    with pytest.raises(Fault, match=r"000007\.png: damaged .*delete it"):
        samples.read(tmp_path, 7)


def test_the_shapes_suite_has_its_own_rewards():
    task = task_of("shapes", None, (), "test", 4, 0, 16)
    assert task.rewards == ("shapes_geneval", "shapes_geneval_strict")
    assert {entry["tag"] for entry in task.entries} == set(captions.TASKS)
    assert sys.maxsize >= task.seed_of(3) != task.seed_of(4)
