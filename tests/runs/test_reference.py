"""What a divergence pulls to, where that moves: a copy of the trained model that is reset."""

import json

import pytest
from safetensors.torch import load_file

from diffalign import config as configs
from diffalign.errors import UserError
from diffalign.planning import architectures
from diffalign.planning.facts import facts
from diffalign.rules import RULES
from diffalign.runs import session
from diffalign.runs.resume import take_up, with_kept
from tests.kit.helpers import tiny_config

MORE = ["rewards={jpeg_compressibility: 1}", "optimizer.lr=0.01", "evaluation.enabled=false", "updates=4"]
PULLED = "name: flow_grpo, window: null, kl: 0.1"


def trained(place, rule, *more):
    session.train(tiny_config(place, *MORE, f"rule={{{rule}}}", *more), quiet=True)
    return [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]


def kl(rows):
    return [row["kl"] for row in rows if "kl" in row]


EVERY = f"{PULLED}, reference: moving, reference_every: 2"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("moving") / "run", EVERY)


def test_every_so_many_updates_the_copy_is_the_model(rows):
    found = kl(rows)
    assert found[0] == found[2] == 0 and found[1] > 0 and found[3] > 0
    assert [row.get("reference_reset") for row in rows if "kl" in row] == [None, 1.0, None, 1.0]


def test_4_above_the_limit_it_is_reset_and_not_below(tmp_path):
    """At 0 after every update that moved away from it: the next one's divergence is exactly 0, so it stays for one more."""
    found = kl(trained(tmp_path / "run", f"{PULLED}, reference: moving, reference_limit: 0"))
    assert found[0] == found[2] == 0 and found[1] > 0 and found[3] > 0
    never = kl(trained(tmp_path / "never", f"{PULLED}, reference: moving, reference_limit: 1.0e+9"))
    assert all(value > 0 for value in never[1:]) and never[2] > found[2]


def test_4_one_that_is_never_reset_is_the_start(tmp_path):
    trained(tmp_path / "first", PULLED)
    start = f"lora.start={tmp_path / 'first'}"
    trained(tmp_path / "start", f"{PULLED}, reference: start", start)
    trained(tmp_path / "moving", f"{PULLED}, reference: moving, reference_every: 99", start)
    one, two = (
        load_file(tmp_path / name / "adapter" / "pytorch_lora_weights.safetensors") for name in ("start", "moving")
    )
    assert all((one[key] == two[key]).all() for key in one)


def test_2_4_a_reset_survives_a_resume(rows, tmp_path):
    """Stopped an update after it: the next divergence is the uninterrupted run's, bit for bit."""
    trained(tmp_path / "run", EVERY, "updates=3")
    assert kl(trained(tmp_path / "run", EVERY)) == kl(rows)


def test_it_is_counted_in_memory_like_the_start(monkeypatch):
    monkeypatch.setattr(architectures, "row", lambda config, module: architectures.NOTHING)
    monkeypatch.setattr(architectures, "decoder", lambda config: None)

    def copies(*more):
        return facts(configs.load("awm/sd35-medium", ["rule.kl=0.1", *more])).copies

    moving = copies("rule.reference=moving", "rule.reference_every=5")
    assert moving == copies("lora.start=owner/name") == copies() + 1


def test_a_run_from_before_there_was_the_choice_goes_on_with_the_base():
    config = configs.load("flow_grpo/shapes-sd3", ["lora.start=owner/name", "rule.kl=0.1"])
    assert config.reference == "start"
    old = configs.settings(config)
    assert take_up("runs/x", old, [], config, False).kept == {}
    del old["rule"]["reference"]
    taken = take_up("runs/x", old, [], config, False)
    assert with_kept(config, taken.kept).reference == "base"
    without = configs.load("flow_grpo/shapes-sd3", ["lora.start=owner/name", "rule.kl=0"])
    old = configs.settings(without)
    del old["rule"]["reference"]
    assert take_up("runs/x", old, [], without, False).kept == {}  # nothing is pulled


@pytest.mark.parametrize("rule", [name for name, kind in RULES.items() if "reference" in kind.Settings.model_fields])
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("kl: 0.1, reference: moving", "rule.reference: got moving, which neither .* allowed with one or both"),
        ("kl: 0.1, reference_every: 2", "rule.reference_every: got 2, has no effect without rule.reference: moving"),
        ("kl: 0, reference_limit: 1", "rule.reference_limit: got 1.0, has no effect without rule.kl"),
        ("kl: 0.1, reference: moving, reference_every: 0", "rule.reference_every: got 0"),
    ],
)
def test_what_has_no_effect_is_refused(rule, settings, said):
    with pytest.raises(UserError, match=said):
        preset = {"ddpo": "ddpo/shapes-sd"}.get(rule, f"{rule}/shapes-sd3")
        configs.load(preset, [f"rule={{name: {rule}, {settings}}}"])


@pytest.mark.parametrize("rule", ["{name: awm, times: 1, kl: 0.1}", f"{{{PULLED}}}"])
@pytest.mark.wide
def test_R18_the_reference_of_a_guided_run_is_guided_alike(rule, tmp_path):
    """Before anything has moved predictions are the reference's, which those without guidance are not."""
    given = ["sampler.guidance_scale=4", "evaluation.enabled=false", "updates=1", "rewards={jpeg_compressibility: 1}"]
    session.train(tiny_config(tmp_path / "run", *given, f"rule={rule}"), quiet=True)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if "kl" in row]
    assert (row["kl"], row["norm_ratio"], row["norm_radial"]) == (0.0, 1.0, 0.0)
