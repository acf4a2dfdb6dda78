"""Real pipeline classes with tiny random weights, through the one backend: every cell of the table in docs/pipelines.md."""

import inspect

import pytest

from diffalign.errors import UserError
from diffalign.models.families import table
from tests.families import FAMILIES, build
from tests.families.__main__ import LISTED, PAGE, bases, committed, markdown
from tests.families.probe import policy, probe

NEEDED = (
    "pictures",
    "replay fp32",
    "bf16",
    "guided",
    "gradient",
    "decode gradient",
    "any t",
    "checkpointing",
    "LoRA file",
)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_does_what_the_table_says(name):
    found = probe(name)
    assert found == committed()[name]
    assert [key for key in NEEDED if found[key] != "yes"] == []


def test_the_page_of_bases_says_what_the_configs_say():
    assert bases() == PAGE.read_text(encoding="utf-8")
    named = [line.split("|")[1].strip() for line in bases().splitlines() if line.startswith("| ")][1:]
    assert sorted(named) == sorted(facts["model"] for facts in table().values())


def test_the_readme_shows_the_table():
    assert list(committed()) == list(FAMILIES)
    assert markdown(committed()) in LISTED.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", FAMILIES)
def test_even_levels_are_for_pipelines_whose_call_can_be_told_them(name):
    """Else an adapter trained on them could not be sampled on them by others."""
    pipe = build(name)
    calls = (type(pipe).__call__, type(pipe.scheduler).set_timesteps)
    told = all("sigmas" in inspect.signature(call).parameters for call in calls)
    if told and FAMILIES[name].process == "flow_sde":
        levels = policy(name, sigmas="linear").levels
        assert levels.sigma[0] == 1
        assert levels.sigma[-1] == 0
        assert (levels.sigma[1:] < levels.sigma[:-1]).all()
    elif FAMILIES[name].process == "flow_sde":
        with pytest.raises(UserError, match="sampler.sigmas: got 'linear', .* cannot be told its levels"):
            policy(name, sigmas="linear")


def test_the_first_step_of_a_solver_s_levels_gets_no_more_noise_than_elsewhere():
    """UniPC's first level is 1 - 1e-6: taken as it is, Flow-SDE's noise of a sqrt(t / (1 - t)) sqrt(dt) would be 221 there. At t = 1
    Flow-GRPO takes the next level instead, which leaves a."""
    made = policy("Wan 2.1")
    assert made.levels.sigma[0] == 1
    assert made.schedule.std[0] == pytest.approx(0.7)
