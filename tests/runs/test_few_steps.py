"""What is said of a model's network at the start of a run whose rule draws noise anew."""

from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from diffalign import config as configs
from diffalign.cli.commands import app
from diffalign.errors import UserError
from diffalign.models import few_steps
from diffalign.rules import GAP
from diffalign.runs import distilled, parts

ADVICE = few_steps.ADVICE
FEW = ("sampler.steps=4", "optimizer.micro_batch=16", "run_dir=unused")


def settings(name, *overrides):
    return configs.load(f"nft/{name}", [*FEW, "rule.states=forward", *overrides])


@pytest.fixture(scope="module")
def walked():
    """Of each model: its parts, and how its network stands to its own walk."""
    found = {}
    for name in ("shapes-turbo", "shapes-sd3"):
        config = settings(name)
        made = parts.build(config, lambda line: None)
        found[name] = made, distilled.measured(config, made.policy, print)
    return found


def said(config, walked, monkeypatch, sign=None):
    """The lines on few steps; what was measured is not measured again."""
    made, _ = walked
    if sign is not None:
        monkeypatch.setattr(distilled.families, "distilled", lambda model: sign)
    lines = []
    distilled.introduce(config, made.policy, lines.append)
    return lines


def test_the_margin_between_a_distilled_network_and_a_flow(walked):
    """Sixteen samples; of 64, D at the noisiest level is in benchmarks/results/few_steps.json."""
    turbo, flow = walked["shapes-turbo"][1], walked["shapes-sd3"][1]
    assert turbo.distilled and not flow.distilled
    assert turbo.gaps[0] < 0.8 * GAP and flow.gaps[0] > 2 * GAP
    assert turbo.shares[0] > flow.shares[0] + 0.1


def test_a_distilled_model_is_told_what_to_set(walked, monkeypatch):
    (line,) = said(settings("shapes-turbo"), walked["shapes-turbo"], monkeypatch)
    found = walked["shapes-turbo"][1]
    assert line == f"this model is distilled ({found}; its name (turbo)): {ADVICE}"
    (line,) = said(settings("shapes-turbo"), walked["shapes-turbo"], monkeypatch, sign="")
    assert line == f"this model is distilled ({found}; neither its name nor its files say so): {ADVICE}"


def test_a_flow_at_few_steps_is_measured_and_nothing_is_advised(walked, monkeypatch):
    (line,) = said(settings("shapes-sd3"), walked["shapes-sd3"], monkeypatch)
    assert line.startswith(f"4 steps, {walked['shapes-sd3'][1]}: this model is not distilled") and ADVICE not in line


def test_numbers_and_a_name_that_disagree_are_both_said(walked, monkeypatch):
    (line,) = said(settings("shapes-sd3"), walked["shapes-sd3"], monkeypatch, sign="its name (turbo)")
    found = walked["shapes-sd3"][1]
    assert line == (
        f"its name (turbo) says that this model is distilled, {found} that it is not (D below 0.15 is); if it is: {ADVICE}"
    )


def test_where_nothing_can_be_measured_the_name_decides(walked, monkeypatch):
    monkeypatch.setattr(distilled, "own_walk", lambda policy, prompts: None)
    (line,) = said(settings("shapes-turbo"), walked["shapes-turbo"], monkeypatch)
    assert line == f"its name (turbo) says that this model is distilled, 4 steps are too few to measure it: {ADVICE}"


@pytest.mark.parametrize(
    "given",
    [
        ("awm/shapes-sd3",),
        ("nft/shapes-turbo", *FEW),
        ("nft/shapes-sd3", *FEW, "rule.levels=[0, 2]", "rule.times=1"),
        ("flow_grpo/shapes-turbo", *FEW),
    ],
)
def test_an_ordinary_model_and_a_rule_that_suits_are_not_asked(given):
    name, *overrides = given
    config = configs.load(name, overrides)
    policy = SimpleNamespace(schedule=SimpleNamespace(steps=config.sampler.steps))  # it is not called
    lines = []
    distilled.introduce(config, policy, lines.append)
    assert lines == []


@pytest.mark.parametrize("given", [["awm/shapes-turbo"], ["flow_grpo/shapes-turbo"]])
@pytest.mark.wide
def test_doctor_measures_the_model_of_a_config_whatever_its_rule(given, walked):
    """Rewards are not loaded, and nothing is trained; the line is the one of a run's start."""
    done = CliRunner().invoke(app, ["doctor", *given])
    assert done.exit_code == 0, done.output
    last = done.output.strip().splitlines()[-1]
    assert (
        last.startswith("shapes-turbo         this model is distilled (D 0.") and "16 samples; its name (turbo)" in last
    )
    anew = given[0].startswith("awm") and configs.load(*given[:1]).make_rule().renoises(4)
    assert last.endswith(ADVICE if anew else ", which this config's rule does not mind")


def test_what_is_measured_does_not_depend_on_how_many_are_drawn_at_a_time(walked):
    config = settings("shapes-turbo", "optimizer.micro_batch=2")
    few = distilled.measured(config, parts.bare(config), print)
    whole = walked["shapes-turbo"][1]
    assert few.samples == whole.samples == 16
    assert few.gaps == pytest.approx(whole.gaps, rel=1e-4) and few.shares == pytest.approx(whole.shares, rel=1e-3)


def test_doctor_refuses_a_config_before_it_looks_at_anything():
    done = CliRunner().invoke(app, ["doctor", "nft/shapes-turbo", "sampler.stepps=4"])
    assert isinstance(done.exception, UserError) and "sampler.stepps" in str(done.exception.problems)
    assert done.output == ""
