"""`diffalign init`: what it writes trains as it stands."""

import huggingface_hub
import pytest
from click.testing import CliRunner

from diffalign import config as configs
from diffalign.cli import app
from diffalign.errors import UserError
from diffalign.models import few_steps
from diffalign.planning import cost, remarks, starter
from diffalign.rules import RULES
from diffalign.shapes import models
from tests.backends.test_hub_configs import CONFIGS
from tests.families import folder
from tests.kit.commands import diffalign
from tests.kit.helpers import tiny

HUB = sorted({configs.load(name).model for name in CONFIGS})


@pytest.mark.parametrize("model", [*HUB, *models.names()])
def test_what_is_written_is_a_config_of_that_model(model, tmp_path):
    starter.write(tmp_path / "mine.yaml", model)
    found = configs.load(str(tmp_path / "mine.yaml"))
    assert found.model == model
    assert found.run_dir == "runs/mine"
    assert len((tmp_path / "mine.yaml").read_text().splitlines()) <= 25


@pytest.mark.parametrize("rule", sorted(name for name, rule in RULES.items() if rule().needs.rewards))
def test_every_rule_is_written_with_a_sampler_it_takes(rule, tmp_path):
    starter.write(tmp_path / "mine.yaml", rule=rule, rewards=["shapes_pref"])
    found = configs.load(str(tmp_path / "mine.yaml"))
    assert (found.rule["name"], found.rewards) == (rule, {"shapes_pref": 1.0})
    assert "shapes_pref" not in found.eval_rewards


def test_it_trains_as_it_stands(tmp_path):
    (tmp_path / "mine.txt").write_text("\n".join(f"a photo of {k} stars" for k in range(8)))
    more = ["--prompts", "mine.txt", "--reward", "jpeg_compressibility"]
    done = diffalign("init", "first.yaml", *more, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "first.yaml: from flow_grpo/shapes-sd3; .diffalign.schema.json beside it is for editors",
        "diffalign train first.yaml",
    ]
    done = diffalign("train", "first.yaml", *tiny("flow_grpo"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "first" / "adapter").is_dir()


def test_a_card_is_fitted_into_the_file(tmp_path):
    model = "stabilityai/stable-diffusion-3.5-medium"
    said = starter.write(tmp_path / "mine.yaml", model, vram=16)
    assert said[1].startswith("fits        16 GiB: ")
    found = configs.load(str(tmp_path / "mine.yaml"))
    assert (found.memory.vram, found.memory.judges) == (16, "offloaded")
    with pytest.raises(UserError, match="--vram: got 2, "):
        starter.write(tmp_path / "small.yaml", model, vram=2)
    assert not (tmp_path / "small.yaml").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rule", "grpo"], "--rule: got 'grpo', allowed are awm, branch_grpo"),
        (["--prompts", "gone.txt"], "prompts.source: 'gone.txt' is no file"),
        (["--reward", "nice"], "rewards: "),
        (["--model", "no such folder"], "model: got 'no such folder'"),
        (["--rule", "rlr", "--reward", "jpeg_compressibility"], "rlr"),
    ],
)
def test_what_does_not_go_together_leaves_no_file(options, said, tmp_path):
    with pytest.raises(UserError, match=said):
        CliRunner().invoke(app, ["init", str(tmp_path / "x.yaml"), *options], catch_exceptions=False)
    assert not (tmp_path / "x.yaml").exists()


SCHNELL = "black-forest-labs/FLUX.1-schnell"


@pytest.mark.parametrize(
    ("rule", "kept", "written"),
    [
        ("awm", {"levels": [0, 2], "first_level": True, "times": 2}, {"steps": 4, "guidance_scale": 0.0}),
        ("nft", {"states": "own"}, {"steps": 4, "guidance_scale": 0.0}),
        ("flow_grpo", {"window": [0, 2]}, {"steps": 4, "process": "cps", "noise_level": 0.9}),
    ],
)
def test_a_distilled_model_is_written_so_that_it_stays_sharp(rule, kept, written, tmp_path):
    said = starter.write(tmp_path / "mine.yaml", SCHNELL, rule)
    found = configs.load(str(tmp_path / "mine.yaml"))
    assert kept.items() <= found.rule.items()
    assert written.items() <= found.sampler.model_dump().items()
    shown = {"awm": "rule.levels: [0, 2]", "nft": "rule.states: own", "flow_grpo": "sampler.process: cps"}[rule]
    assert said[1] == f"its name (schnell) says that this model is distilled: sampler.steps: 4, {shown}"
    assert remarks.few_steps(found, found.make_rule()) == []


def test_a_plan_says_that_noise_drawn_anew_blurs_a_distilled_model_and_nothing_of_others():
    plain = configs.load("awm/sd35-medium")
    (said,) = (
        remarks.few_steps(found, found.make_rule())
        for found in [configs.load("flow_grpo/flux-schnell", ["rule={name: nft}"])]
    )
    assert said == [f"its name (schnell) says that this model is distilled: {few_steps.ADVICE}"]
    assert remarks.few_steps(plain, plain.make_rule()) == []
    other = configs.load("flow_grpo/flux-schnell")
    assert remarks.few_steps(other, other.make_rule()) == []


def test_nothing_is_said_of_an_ordinary_model(tmp_path):
    said = starter.write(tmp_path / "mine.yaml", "stabilityai/stable-diffusion-3.5-medium", "awm")
    assert len(said) == 2 and "states" not in (tmp_path / "mine.yaml").read_text()


def test_a_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(UserError, match=r"init: got .*there is no folder .*gone.*; make it first"):
        starter.write(tmp_path / "gone" / "x.yaml")
    assert list(tmp_path.iterdir()) == []


def test_nothing_of_the_users_is_replaced(tmp_path):
    (tmp_path / "x.yaml").write_text("mine")
    with pytest.raises(UserError, match="init: got .*which is there; name a new file"):
        starter.write(tmp_path / "x.yaml")
    assert (tmp_path / "x.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("family", "rule"), [("SD 1.5", "ddpo"), ("SD 3.5 Medium", "flow_grpo"), ("Wan 2.1", "flow_grpo")]
)
def test_a_model_of_no_familys_size_begins_with_what_its_files_say(family, rule, tmp_path):
    """Tiny forms are of no family's size; what is written goes through the real pipeline's own checks."""
    place = tmp_path / "mine.yaml"
    starter.write(place, str(folder(family)), None, ["jpeg_compressibility"], None)
    loaded = configs.load(str(place))
    assert loaded.rule["name"] == rule
    if family != "Wan 2.1":  # no size tells it from its family
        assert "sampler:" not in place.read_text()
        assert cost.count(loaded).samples == loaded.samples_per_update


def test_a_model_that_nothing_is_known_of_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("none"))
    )
    with pytest.raises(UserError, match="what suits 'owner/name' is not known here"):
        starter.write(tmp_path / "mine.yaml", "owner/name")
    assert not (tmp_path / "mine.yaml").exists()
