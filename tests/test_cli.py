"""The command line as a user meets it: what it prints, what it leaves, and how it refuses."""

import resource
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.cli import commands, main
from tests.kit.commands import diffalign as run
from tests.kit.helpers import TINY, checkpoints, saved_state

# A reward that tells any two pictures apart, so that two updates really train; alpha differs from rank.
TRAINED = ["rewards={jpeg_compressibility: 1}", "lora.rank=4", "lora.alpha=20", "optimizer.lr=0.02"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "run"
    done = run("train", "flow_grpo/shapes-sd3", *TINY, *TRAINED, f"run_dir={folder}")
    assert done.returncode == 0, done.stderr
    assert "eval/shapes_geneval: gain" in done.stdout
    assert done.stdout.strip().endswith("pytorch_lora_weights.safetensors")
    assert "update 2/2" in done.stderr
    return folder


def test_sample_writes_pictures_and_a_grid(trained, tmp_path):
    prompt = "a photo of a red circle left of a blue square"
    done = run("sample", str(trained), "--prompt", prompt, "-n", "8", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"grid.png", "index.html", *(f"000_seed{k}.png" for k in range(8))}
    assert Image.open(tmp_path / "out" / "000_seed0.png").size == (64, 64)
    assert Image.open(tmp_path / "out" / "grid.png").size[0] > 8 * 64


@pytest.mark.wide
def test_five_lines_of_diffusers_draw_the_training_pipelines_picture(trained, tmp_path):
    """alpha differs from rank; the five lines import diffusers, torch and numpy only."""
    from diffalign import config
    from diffalign.models import loading
    from diffalign.runs import parts as build
    from diffalign.shapes import models
    from diffalign.types import Plan, Prompts

    folder, out = models.path("shapes-sd3"), tmp_path / "image.npy"
    script = f"""
import numpy, torch, diffusers
pipe = diffusers.DiffusionPipeline.from_pretrained({str(folder)!r})
pipe.load_lora_weights({str(trained / "adapter")!r})
call = dict(num_inference_steps=3, sigmas=[1, 2 / 3, 1 / 3], guidance_scale=1.0, max_sequence_length=1, output_type="np")
numpy.save({str(out)!r}, pipe("a photo of two stars", generator=torch.Generator().manual_seed(7), **call).images[0])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    settings = config.load("flow_grpo/shapes-sd3", [*TINY, *TRAINED, f"run_dir={trained}"])
    parts = build.build(settings)

    state = saved_state(checkpoints(trained)[-1])
    with torch.no_grad():
        for name, parameter in parts.policy.parameters.items():
            parameter.copy_(state.shadows.get("ema", state.parameters)[name])
    keys = np.array([7])
    one = Prompts(["a photo of two stars"], np.array([0]), keys, keys, [{}])
    part = parts.policy.rollout(one, Plan.deterministic(3))
    ours = parts.policy.decode(part, part.x[-1]).pixels[0, 0].permute(1, 2, 0).numpy()
    assert np.abs(np.load(out) - ours).max() < 1e-5
    base = build.policy(settings, loading.load("shapes-sd3")[0])
    assert (
        np.abs(
            base.decode(part, base.rollout(one, Plan.deterministic(3)).x[-1]).pixels[0, 0].permute(1, 2, 0).numpy()
            - ours
        ).max()
        > 1e-3
    )


def test_sample_from_a_model_a_prompt_file_and_other_settings(tmp_path):
    (tmp_path / "p.txt").write_text("a photo of a star\na photo of two circles\n")
    done = run(
        "sample",
        "shapes-sd3",
        "--prompts",
        str(tmp_path / "p.txt"),
        "-n",
        "1",
        "--steps",
        "2",
        "--guidance",
        "3",
        "--out",
        str(tmp_path / "o"),
    )
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "o").iterdir()} == {"000_seed0.png", "001_seed0.png", "grid.png", "index.html"}


def test_plan_says_what_an_update_does_without_loading_weights(tmp_path):
    done = run("plan", "flow_grpo/shapes-sd3")
    assert done.returncode == 0, done.stderr
    # 64 samples: 10 steps of sampling and 3 trained ones
    assert f"rows        {64 * 13} forward, of them {64 * 3} with backward" in done.stdout
    assert "noise on steps 0 to 2" in done.stdout
    assert "a 1024 x 1024 product measured now" in done.stdout


def test_plan_counts_the_rows_that_training_uses(trained):
    from diffalign.runs.folder import read_rows

    row = next(row for row in read_rows(trained) if "nfe" in row and not row.get("skipped_flat"))
    done = run("plan", "flow_grpo/shapes-sd3", *TINY, *TRAINED)
    assert f"rows        {row['nfe']:.0f} forward, of them {row['nfe_backward']:.0f} with backward" in done.stdout


def test_rewards_are_listed_and_checked(tmp_path):
    listed = run("rewards")
    assert listed.returncode == 0
    assert "shapes_geneval " in listed.stdout
    assert run("rewards", "check", "jpeg_compressibility").stdout.strip().endswith("ok")
    (tmp_path / "dead.py").write_text("def f(media, prompts):\n    return [0.0] * len(prompts)\n")
    dead = run("rewards", "check", f"{tmp_path}/dead.py:f")
    assert dead.returncode == 3
    assert "cannot tell them apart" in dead.stderr


def test_a_users_own_reward_from_one_file(tmp_path):
    (tmp_path / "mine.py").write_text("def brightness(media, prompts):\n    return media.pixels.mean((1, 2, 3, 4))\n")
    done = run(
        "train",
        "flow_grpo/shapes-sd3",
        *TINY,
        "rewards={./mine.py:brightness: 1.0}",
        "evaluation.enabled=false",
        f"run_dir={tmp_path}/run",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "reward/./mine.py:brightness" in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_doctor_names_versions_and_mends():
    done = run("doctor")
    assert "torch" in done.stdout
    assert "pip install 'diffalign[hpsv2]'" in done.stdout or "hpsv2" in done.stdout
    assert done.returncode in (0, 3)


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_sample_draws_the_base_beside_from_the_same_seeds_and_scales_adapters(trained, tmp_path):
    prompt = "a photo of <two> stars"

    def draw(name, *options):
        done = run("sample", *options, "--prompt", prompt, "-n", "1", "--seed", "3", "--out", str(tmp_path / name))
        assert done.returncode == 0, done.stderr
        return tmp_path / name

    both = draw("both", str(trained), "--base")
    page = (both / "index.html").read_text()
    assert "000_seed3_base.png" in page and "&lt;two&gt;" in page and "<two>" not in page
    aligned, base = pixels(both / "000_seed3.png"), pixels(both / "000_seed3_base.png")
    assert np.abs(aligned - base).max() > 0
    off = draw("off", str(trained), "--strength", "0")
    np.testing.assert_array_equal(pixels(off / "000_seed3.png"), base)
    # Twice at a half is once in full; rounding to 8 bits may move a value by one.
    halves = draw("halves", str(trained), "--strength", "0.5", "--adapter", f"{trained / 'adapter'}:0.5")
    assert np.abs(pixels(halves / "000_seed3.png") - aligned).max() <= 1


def test_sample_takes_a_negative_prompt(tmp_path):
    def draw(name, *options):
        command = [
            "sample",
            "shapes-sd3",
            "--prompt",
            "a photo of a star",
            "-n",
            "1",
            "--steps",
            "3",
            "--guidance",
            "3",
        ]
        done = run(*command, *options, "--out", str(tmp_path / name))
        assert done.returncode == 0, done.stderr
        return pixels(tmp_path / name / "000_seed0.png")

    assert np.abs(draw("plain") - draw("negative", "--negative", "a photo of a red square")).max() > 0


def test_a_file_in_the_way_is_one_line_and_exit_code_3(tmp_path):
    (tmp_path / "o" / "000_seed0.png").mkdir(parents=True)
    done = run("sample", "shapes-sd3", "--prompt", "a", "-n", "1", "--steps", "1", "--out", str(tmp_path / "o"))
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (3, 1), done.stderr
    assert "000_seed0.png: Is a directory" in done.stderr


def test_an_adapter_of_numbers_that_are_not_finite_or_of_another_shape_is_refused(trained, tmp_path):
    from safetensors.torch import load_file, save_file

    path = trained / "adapter" / "pytorch_lora_weights.safetensors"
    good = load_file(path)
    key = next(iter(good))
    for bad, expected in (
        (good[key] * float("nan"), "holds numbers that are not finite"),
        (good[key][:1], "which do not fit"),
    ):
        save_file({**good, key: bad}, tmp_path / "pytorch_lora_weights.safetensors")
        done = run("sample", "shapes-sd3", "--adapter", str(tmp_path), "--prompt", "a", "--out", str(tmp_path / "o"))
        assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1), done.stderr
        assert expected in done.stderr


def test_config_prints_every_key_with_its_meaning():
    done = run("config", "ddpo/shapes-sd", "rule.clip=1e-3")
    assert done.returncode == 0, done.stderr
    assert "  clip: 0.001  # half-width of the ratio's range" in done.stdout
    assert "checkpoint_every: 10  # updates between checkpoints [whole, >= 1]" in done.stdout


BAD = [
    (["train", "flow_grpo/shapes-sd3", "upates=3"], ["upates: unknown key; did you mean updates?"]),
    (["train", "flow_grpo/shapes-sd3", "updates=many", "lora.rnk=2"], ["updates: got 'many'", "lora.rnk: unknown key"]),
    (["train", "flow_grpo/shapes-sd3", "sampler.process=ode"], ["flow_grpo needs a stochastic sampler"]),
    (["train", "nowhere.yaml"], ["config: no file 'nowhere.yaml'"]),
    (["train", "flow_grpo/shapes-sd3", "prompts.source={broken}"], ["broken.jsonl line 2: not JSON"]),
    (["train", "flow_grpo/shapes-sd3", "run_dir=/proc/nowhere"], ["run_dir: got '/proc/nowhere', cannot write there"]),
    (["train"], ["Missing argument 'CONFIG'"]),
    (["trian"], ["No such command 'trian'"]),
    (["train", "flow_grpo/shapes-sd3", "--frsh"], ["No such option"]),
    (["sample", "shapes-sd3"], ["sample: no caption; give --prompt TEXT or --prompts FILE"]),
    (["sample", "nowhere", "--prompt", "a"], ["sample: got 'nowhere', which is no run"]),
    (["sample", "shapes-sd3", "--prompt", "a", "-n", "0"], ["Invalid value for '-n'"]),
    (["sample", "shapes-sd3", "--prompt", "a", "--base"], ["--base: shapes-sd3 is sampled without an adapter"]),
    (
        ["sample", "shapes-sd3", "--prompt", "a", "--strength", "0.5"],
        ["--strength: got 0.5, shapes-sd3 has no adapter"],
    ),
    (["sample", "shapes-sd3", "--prompt", "a", "--adapter", "./nowhere:2"], ["--adapter: got './nowhere"]),
    (["sample", "shapes-sd3", "--prompt", "a", "--adapter", "x:1e9"], ["--adapter: got 'x:1e9', allowed are PLACE"]),
    (["sample", "shapes-sd3", "--prompt", "a", "--guidance", "nan"], ["'nan' is not a finite number"]),
    (["sample", "shapes-sd3", "--prompts", "."], ["--prompts: '.' is a folder"]),
    (
        ["sample", "shapes-sd3", "--prompt", "a", "--guidance", "1", "--negative", "b"],
        ["--negative: no effect at guidance 1"],
    ),
    (["sample", "shapes-sd3", "--prompts", "nowhere.txt"], ["'nowhere.txt' is no file"]),
    (["rewards", "check", "shapes_genevil"], ["did you mean shapes_geneval"]),
    (["plan", "flow_grpo/shape-sd3"], ["did you mean flow_grpo/shapes-sd3?"]),
]


@pytest.mark.parametrize(("arguments", "lines"), BAD, ids=lambda v: v[-1] if isinstance(v, list) else v)
def test_bad_input_is_one_line_a_mistake_exit_code_2_and_fast(arguments, lines, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a", "include": []}\n{"prompt": \n')
    given = [a.format(broken=broken) if "{broken}" in a else a for a in arguments]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run(*given)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime - before.ru_utime  # of work: other processes' do not count
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for line in lines:
        assert sum(line in got for got in done.stderr.splitlines()) == 1, done.stderr
    assert len(done.stderr.splitlines()) == len(lines)
    assert seconds < 2  # 0.6 s; with torch loaded it would be 3 s and more


def test_a_fault_is_exit_code_3_and_keeps_what_was_there(trained, tmp_path):
    (tmp_path / "bad.py").write_text("def f(media, prompts):\n    raise ConnectionError('reward server is down')\n")
    done = run(
        "train",
        "flow_grpo/shapes-sd3",
        *TINY,
        f"rewards={{{tmp_path}/bad.py:f: 1}}",
        "evaluation.enabled=false",
        f"run_dir={tmp_path}/r",
    )
    assert done.returncode == 3
    assert "ConnectionError: reward server is down" in done.stderr
    assert "Traceback" not in done.stderr


def test_plan_knows_the_rewards_a_gate_names():
    gated = run("plan", "flow_grpo/shapes-sd3", "rule.gate={shapes_geneval_partial: 0.5}")
    assert gated.returncode == 0, gated.stderr


@pytest.mark.parametrize(
    ("config", "override", "field"),
    [
        ("rlr/shapes-sd3", "rule={name: rlr, depth: auto, memory_gib: .inf}", "rule.memory_gib: got inf"),
        ("branch_grpo/shapes-sd3", "rule.fusion=.inf", "rule.fusion: got inf"),
        ("nft/shapes-sd3", "rule.beta=.inf", "rule.beta: got inf"),
        ("branch_grpo/shapes-sd3", "rule.sibling_noise=0", "rule.sibling_noise: got 0"),
        ("flow_grpo/shapes-sd3", "sampler.noise_level=1e9", "sampler.noise_level: got"),
    ],
)
def test_numbers_without_bounds_are_refused(config, override, field):
    done = run("plan", config, override)
    assert done.returncode == 2
    assert field in done.stderr


def test_a_preview_shows_samples_with_and_without_noise(tmp_path):
    from PIL import Image

    place = tmp_path / "new" / "noise.png"
    few = ["sampler.steps=3", "rule.window=null"]
    done = run("plan", "flow_grpo/shapes-sd3", *few, "--preview", str(place))
    assert done.returncode == 0, done.stderr
    assert "below noise at steps [0, 1], level 0.7" in done.stdout
    picture = np.asarray(Image.open(place))
    above, below = picture[:128], picture[-128:]
    assert np.abs(above.astype(int) - below.astype(int)).mean() > 1
    quiet = run("plan", "truncated_bp/shapes-sd3", "sampler.steps=3", "rule.depth=1", "--preview", str(place))
    assert quiet.returncode == 0, quiet.stderr
    picture = np.asarray(Image.open(place))
    assert (picture[:128] == picture[-128:]).all()  # an ODE config has none
    done = run("plan", "flow_grpo/shapes-sd3", "--preview", str(tmp_path / "noise.txt"))
    assert done.returncode == 2
    assert "allowed is a .png or .jpg file" in done.stderr


def test_stage_prompts_are_asked_for_and_trained_with(tmp_path):
    from tests.prompts.test_stage_writer import GOOD, Endpoint

    endpoint, out = Endpoint((200, GOOD)), tmp_path / "stages.jsonl"
    source = tmp_path / "prompts.txt"
    source.write_text("a photo of two stars\n")
    few = [f"prompts.source={source}", "rewards={jpeg_compressibility: 1.0}", "eval_rewards=[]"]
    done = run("stages", "flow_grpo/shapes-sd3", *few, "--endpoint", endpoint.url, "--model", "m", "--out", str(out))
    endpoint.server.shutdown()
    assert done.returncode == 0, done.stderr
    assert "1/1 a photo of two stars -> one | two | three" in done.stdout
    done = run("plan", "flow_grpo/shapes-sd3", *few, f"prompts.stages={out}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["sample", "shapes-sd3", "--prompt", "a", "--out"], "--out"),
        (["plan", "flow_grpo/shapes-sd3", "--preview"], "--preview"),
        (["gradients", "rlr/shapes-sd3", "--batches", "4", "--out"], "--out"),
    ],
)
def test_where_nothing_can_be_written_is_named_with_its_option(command, option, tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = run(*command, str(tmp_path / "file" / "inside" / "out.png"))
    assert done.returncode == 2, done.stderr
    assert f"diffalign: {option}: got" in done.stderr
    assert "cannot write there" in done.stderr


@pytest.mark.wide
def test_a_tilde_is_the_users_home_wherever_a_path_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "p.txt").write_text("a photo of two stars\n")
    few = ["-n", "1", "--steps", "2", "--set", "max_sequence_length=1"]
    commands = [
        ["sample", "shapes-sd3", "--prompts=~/p.txt", *few, "--out=~/pictures"],
        ["evaluate", "shapes-sd3", "--suite=~/p.txt", "--reward", "jpeg_compressibility", *few, "--out=~/judged"],
        ["sample", "shapes-sd3", "--prompt", "x", *few, "--out=~nosuchuser/x"],
    ]
    codes = [subprocess.run([sys.executable, "-m", "diffalign", *line], check=False).returncode for line in commands]
    assert codes == [0, 0, 2]
    assert (tmp_path / "home" / "pictures" / "grid.png").is_file()
    assert (tmp_path / "home" / "judged" / "report.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]


def test_an_option_that_is_a_setting_is_told_as_one(capsys):
    for option, said in (("--lr", "optimizer.lr="), ("--rank", "lora.rank="), ("--batch-size", "prompts.groups times")):
        with pytest.raises(SystemExit) as stop:
            main(["train", "flow_grpo/shapes-sd3", option, "3"])
        assert stop.value.code == 2
        line = capsys.readouterr().err
        assert line.startswith(f"diffalign: No such option {option}; settings are written KEY=VALUE: {said}")
        assert "--help" not in line


@pytest.mark.parametrize(
    "command",
    [
        ("sample", "shapes-sd3", "--prompt", "a photo of two stars", "-n", "2000"),
        pytest.param(("evaluate", "shapes-sd3", "--suite", "shapes", "-n", "50"), marks=pytest.mark.wide),
    ],
    ids=lambda command: command[0],
)
def test_ctrl_c_in_any_command_is_a_line_and_130(command, tmp_path):
    """A process of its own, told once it says what it does; click's Abort is a RuntimeError."""
    words = [sys.executable, "-m", "diffalign", *command, "--out", str(tmp_path / "out")]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=tmp_path)
    assert process.stderr is not None
    first = next(line for line in process.stderr if "sampling" in line or "drawing" in line)
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(60) == 130, first + rest
    assert rest.splitlines()[-1] == "diffalign: interrupted" and "Traceback" not in rest


@pytest.mark.parametrize("stopped", [True, False])
def test_what_an_interrupted_import_raises_is_an_interruption(stopped, monkeypatch, capsys):
    def broken(*args, **kwargs):
        if stopped:
            with suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        raise AttributeError("partially initialized module")

    monkeypatch.setattr(commands, "app", broken)
    left = []
    monkeypatch.setattr(commands, "_leave", lambda code, at_once=False: left.append(code) or sys.exit(code))
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit if stopped else AttributeError):
            commands.main([])
    finally:
        signal.signal(signal.SIGINT, old)
    assert left == ([130] if stopped else [])
