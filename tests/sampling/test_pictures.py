"""Sampling pipelines of several families from the command line: pictures, videos, two experts."""

import json

import imageio.v3 as imageio
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from diffalign.cli import app
from diffalign.errors import UserError
from diffalign.runs import session
from tests.backends.test_hub_configs import tiny
from tests.families import FAMILIES, folder
from tests.kit.helpers import tiny_config


def run(*args: str):
    return CliRunner().invoke(app, list(args))


def settings(name: str) -> list[str]:
    return [part for key, value in FAMILIES[name].call.items() for part in ("--set", f"{key}={json.dumps(value)}")]


def test_a_video_pipeline_writes_videos_with_a_picture_each(tmp_path):
    done = run(
        *("sample", str(folder("Wan 2.1")), "--prompt", "two stars", "-n", "2", "--steps", "2", "--fps", "5"),
        *settings("Wan 2.1"),
        *("--out", str(tmp_path)),
    )
    assert done.exit_code == 0, done.output
    assert {p.name for p in tmp_path.iterdir()} == {
        *(f"000_seed{k}.{kind}" for k in (0, 1) for kind in ("png", "mp4")),
        "grid.png",
        "index.html",
    }
    frames = imageio.imread(tmp_path / "000_seed1.mp4")
    assert frames.shape == (5, 16, 16, 3)
    assert imageio.immeta(tmp_path / "000_seed1.mp4")["fps"] == 5
    # mp4 is lossy
    still = np.asarray(Image.open(tmp_path / "000_seed1.png")).astype(float)
    assert abs(frames[2].astype(float) - still).mean() < 20
    assert '<video src="000_seed1.mp4"' in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize(
    "name", ["flow_grpo/wan22", "flow_grpo/qwen-image", pytest.param("ddpo/sdxl", marks=pytest.mark.wide)]
)
def test_a_run_of_any_family_can_be_sampled(name, tmp_path):
    session.train(tiny(name, tmp_path / "run"), quiet=True)
    done = run(
        "sample",
        str(tmp_path / "run"),
        "--prompt",
        "two stars",
        "-n",
        "1",
        "--base",
        "--strength",
        "100",
        "--out",
        str(tmp_path / "out"),
    )
    assert done.exit_code == 0, done.output
    aligned, base = (np.asarray(Image.open(tmp_path / "out" / f"000_seed0{end}.png")) for end in ("", "_base"))
    assert aligned.shape == base.shape
    assert not np.array_equal(aligned, base)  # a hundred times two small steps
    assert "height=" in (tmp_path / "out" / "index.html").read_text()


@pytest.mark.parametrize("option", ["height", "=3", "he ight=3", "height=[1", "prompt=a", "output_type=pil"])
def test_an_option_that_is_none_is_refused(option):
    done = run("sample", "shapes-sd3", "--prompt", "a", "--set", option)
    assert done.exit_code == 2 or "--set: got" in str(done.exception)


def test_an_argument_the_pipeline_does_not_have_is_named(tmp_path):
    done = run("sample", "shapes-sd3", "--prompt", "a", "--steps", "2", "--set", "frames=3", "--out", str(tmp_path))
    assert "call does not take" in f"{done.output}{done.exception}"
    assert "frames" in f"{done.output}{done.exception}"


@pytest.mark.parametrize("option", ["height=-64", "clip_skip=99"])
def test_whatever_a_pipeline_makes_of_bad_arguments_is_one_line(option, tmp_path):
    done = run(
        "sample",
        "shapes-sd",
        "--prompt",
        "a",
        "--steps",
        "2",
        "--set",
        "width=-64",
        "--set",
        option,
        "--out",
        str(tmp_path),
    )
    assert isinstance(done.exception, UserError)
    (line,) = done.exception.problems
    assert line.startswith("sample: StableDiffusionPipeline does not accept this: ")
    assert "\n" not in line


def test_arguments_that_only_long_prompts_break_are_named_in_training(tmp_path):
    settings = tiny_config(tmp_path / "run", "model=shapes-flux", "evaluation.enabled=false")
    with pytest.raises(UserError, match="sampler.pipeline_args: FluxPipeline does not accept these prompts with"):
        session.train(settings, quiet=True)
