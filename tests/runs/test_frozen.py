"""Adapters that are part of the base, and what a divergence pulls to."""

import json
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file

from diffalign import config as configs
from diffalign.cli import app
from diffalign.errors import UserError
from diffalign.models import loading, merging
from diffalign.models.notes import Notes
from diffalign.models.places import Adapter
from diffalign.runs import parts, session
from diffalign.sampling import sources
from diffalign.types import Plan
from tests.kit.commands import diffalign
from tests.kit.helpers import tiny_config

STRONG = [
    "rewards={jpeg_compressibility: 1}",
    "lora.rank=4",
    "lora.alpha=20",
    "optimizer.lr=0.02",
    "evaluation.enabled=false",
]
PULLED = "rule={name: flow_grpo, window: null, kl: 0.1}"


@pytest.fixture(scope="module")
def speed(tmp_path_factory):
    """A run whose adapter others are trained on top of."""
    place = tmp_path_factory.mktemp("speed") / "run"
    session.train(tiny_config(place, *STRONG), quiet=True)
    return place


def sampled(pipe):
    call = {"num_inference_steps": 3, "guidance_scale": 1.0, "max_sequence_length": 1, "output_type": "np"}
    return pipe(prompt=["two stars"], generator=[torch.Generator().manual_seed(0)], **call).images[0]


def with_strength(place, strength):
    """A pipeline with an adapter as diffusers puts it on."""
    pipe, _ = loading.load("shapes-sd3")
    pipe.load_lora_weights(place / "adapter", adapter_name="a")
    pipe.set_adapters(["a"], [strength])
    return pipe


def test_l28_l30_frozen_is_the_base_and_the_reference(speed, tmp_path):
    settings = tiny_config(tmp_path / "run", *STRONG, f"lora.frozen=[{speed}:0.7]", PULLED)
    made = parts.build(settings, lambda line: None)
    assert not any("frozen" in name for name in made.policy.parameters)
    batch = settings.book.draw(2, 2, 0, 0)
    plan = Plan.deterministic(3)
    before = made.policy.rollout(batch, plan).x[-1]
    alone = np.abs(sampled(with_strength(speed, 0.7)) - sampled(made.pipe)).max()
    assert alone < 1e-4  # the picture at update 0 is that of the frozen adapter alone, to float32's rounding
    assert np.abs(sampled(with_strength(speed, 0.0)) - sampled(made.pipe)).max() > 1e-2
    with torch.no_grad():
        for p in made.policy.parameters.values():
            p.add_(0.1)
    assert not torch.equal(made.policy.rollout(batch, plan).x[-1], before)
    with made.policy.reference():
        assert torch.equal(made.policy.rollout(batch, plan).x[-1], before)
    assert all(p.requires_grad for p in made.policy.parameters.values())


def test_a_run_on_top_is_sampled_on_top_and_says_so(speed, tmp_path, capsys):
    file = speed / "adapter" / "pytorch_lora_weights.safetensors"
    before = file.read_bytes()
    session.train(tiny_config(tmp_path / "run", *STRONG, f"lora.frozen=[{speed}:0.7]"))
    assert f"on top of {speed}:0.7, part of the base in this run" in capsys.readouterr().err
    assert file.read_bytes() == before
    notes = Notes.read(tmp_path / "run" / "adapter")
    assert [(spec["place"], spec["strength"]) for spec in notes.frozen] == [(str(speed / "adapter"), 0.7)]
    page = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "Trained on top of" in page and str(speed) not in page
    done = diffalign("sample", str(tmp_path / "run"), "--prompt", "two stars", "-n", "1", "--out", str(tmp_path / "s"))
    assert done.returncode == 0, done.stderr
    assert f"on top of {speed / 'adapter'}:0.7, as it was trained" in done.stderr
    both, _ = loading.load("shapes-sd3")
    both.load_lora_weights(speed / "adapter", adapter_name="a")
    both.load_lora_weights(tmp_path / "run" / "adapter", adapter_name="b")
    both.set_adapters(["a", "b"], [0.7, 1.0])
    ours = np.asarray(Image.open(tmp_path / "s" / "000_seed0.png"), dtype=float)
    call = sources.resolve(str(tmp_path / "run")).call
    theirs = both(prompt=["two stars"], generator=[torch.Generator().manual_seed(0)], output_type="np", **call).images[
        0
    ]
    assert np.abs(ours - 255 * theirs).max() <= 1


def test_what_was_trained_on_top_of_another_brings_it_along(speed, tmp_path, capsys):
    session.train(tiny_config(tmp_path / "run", *STRONG, f"lora.frozen=[{speed}:0.7]"), quiet=True)
    beside = sources.resolve("shapes-sd3", 1.0, [f"{tmp_path / 'run'}:1"])
    assert [(each.folder, each.strength) for each in beside.frozen] == [(speed / "adapter", 0.7)]
    twice = sources.resolve(str(tmp_path / "run"), 1.0, [f"{tmp_path / 'run'}:-1"])
    assert len(twice.frozen) == 1
    capsys.readouterr()
    session.train(tiny_config(tmp_path / "on", *STRONG, f"lora.start={tmp_path / 'run'}"))
    assert (
        f"lora.start was trained on top of {speed / 'adapter'}:0.7, which is not in lora.frozen here"
        in capsys.readouterr().err
    )
    done = diffalign(
        *(
            "evaluate",
            str(tmp_path / "run"),
            "--suite",
            "shapes",
            "-n",
            "1",
            "--out",
            str(tmp_path / "report"),
            "--steps",
            "2",
        ),
        *("--prompts", "animals", "--reward", "jpeg_compressibility"),
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report" / "report.json").is_file()


def test_l29_a_resume_with_another_frozen_adapter_is_refused(speed, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(speed / "adapter", mine)
    more = [*STRONG, f"lora.frozen=[{mine}]"]
    session.train(tiny_config(tmp_path / "run", *more), quiet=True)
    tensors = load_file(mine / "pytorch_lora_weights.safetensors")
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(mine / "pytorch_lora_weights.safetensors", "pt") as file:
        notes = file.metadata()
    save_file({k: v * 2 for k, v in tensors.items()}, mine / "pytorch_lora_weights.safetensors", metadata=notes)
    with pytest.raises(UserError, match="content of lora.frozen 0"):
        session.train(tiny_config(tmp_path / "run", *more, "updates=3"), quiet=True)
    with pytest.raises(UserError, match="was trained on top of .*mine, which is another now; restore it"):
        sources.resolve(str(tmp_path / "run"))
    shutil.rmtree(mine)
    with pytest.raises(UserError, match="was trained on top of .*mine, which is not there; restore it"):
        sources.resolve(str(tmp_path / "run"))


def kl(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["kl"] for row in rows if "kl" in row]


def test_1_l31_a_divergence_pulls_to_the_start(speed, tmp_path):
    """At the first update it is nothing from the start, and something from the base."""
    begun = f"lora.start={speed}"
    still = "optimizer.lr=1e-12"
    session.train(tiny_config(tmp_path / "own", *STRONG, begun, PULLED, still), quiet=True)
    assert kl(tmp_path / "own")[0] == 0
    based = "rule={name: flow_grpo, window: null, kl: 0.1, reference: base}"
    session.train(tiny_config(tmp_path / "base", *STRONG, begun, based, still), quiet=True)
    assert kl(tmp_path / "base")[0] > 1e-3
    session.train(tiny_config(tmp_path / "own", *STRONG, begun, PULLED, still, "updates=4"), quiet=True)
    assert max(kl(tmp_path / "own")) < 1e-12  # a resumed run remembers where it began


def test_a_run_from_before_there_was_a_choice_keeps_the_base(speed):
    old = configs.completed({"rule": {"name": "flow_grpo", "kl": 0.1}, "lora": {"start": str(speed)}})
    assert old["rule"]["reference"] == "base"
    assert configs.completed({"rule": {"name": "flow_grpo", "kl": 0.1}})["rule"]["reference"] == "auto"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("lora.frozen=[nowhere]", "lora.frozen: got 'nowhere', no pytorch_lora_weights.safetensors there"),
        ("lora.frozen=[SPEED, SPEED]", "one adapter twice; allowed is once, with another strength"),
        ("lora.start=SPEED@7", "lora.start: got .*of that run: .*run@2"),
        ("lora.frozen=[SPEED:x]", "allowed are PLACE and PLACE:STRENGTH, a number to"),
        ("rule.reference=start", "rule.reference: got start without lora.start; allowed are auto and base"),
        ("rule.reference=base", "rule.reference: got base, has no effect without rule.kl"),
    ],
)
def test_what_cannot_be_is_refused(override, said, speed, tmp_path):
    more = [PULLED] if "start" in override else ["rule={name: flow_grpo, window: null, kl: 0}"]
    with pytest.raises(UserError, match=said):
        tiny_config(tmp_path, *more, override.replace("SPEED", str(speed)))


def test_a_packed_base_takes_none(speed, tmp_path):
    with pytest.raises(UserError, match="lora.frozen: what it adds to a base in int8 would be rounded away"):
        tiny_config(tmp_path, f"lora.frozen=[{speed}]", "memory.quantize=int8", "precision=bfloat16")


def test_l33_merged_weights_are_plain_and_draw_the_adapters_pictures(speed, tmp_path):
    out = tmp_path / "merged"
    done = CliRunner().invoke(app, ["merge", str(speed), "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert done.output.startswith(f"{out}: shapes-sd3 with 1 adapter in ")
    names = load_file(out / "transformer" / "diffusion_pytorch_model.safetensors").keys()
    assert not [name for name in names if "lora" in name or "base_layer" in name]
    (tmp_path / "any").write_text("")
    modes = {path.stat().st_mode for path in (*out.rglob("*.safetensors"), *out.rglob("*.json"))}
    assert modes == {(tmp_path / "any").stat().st_mode}, "safetensors writes for the user alone"
    pipe, _ = loading.load(str(out))
    assert np.abs(sampled(pipe) - sampled(with_strength(speed, 1.0))).max() < 1e-4
    with pytest.raises(UserError, match="--out: got .*which holds something; name a new folder"):
        CliRunner().invoke(app, ["merge", str(speed), "--out", str(out)], catch_exceptions=False)


def test_l33_a_bfloat16_base_is_added_to_in_float32(speed):
    """Rounded once: no further from the exact sum than half a unit of its last place."""
    pipe, _ = loading.load("shapes-sd3", torch.bfloat16)
    exact = {k: v.double() for k, v in loading.load("shapes-sd3", torch.bfloat16)[0].transformer.state_dict().items()}
    wanted = with_strength(speed, 1.0)
    from diffalign.models import lora_files

    changes = {
        f"{n}.weight": layer.get_delta_weight("a").double() for n, layer in lora_files.layers(wanted.transformer, "a")
    }
    merging.merge(pipe, [Adapter(speed / "adapter")])
    for name, weight in pipe.transformer.state_dict().items():
        sums = exact[name] + changes.get(name, 0.0)
        assert ((weight.double() - sums).abs() <= sums.abs() * 2.0**-8 + 1e-30).all(), name
