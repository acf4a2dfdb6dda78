"""Sections that may be left out, when a run is taken up: one that comes or goes is what its user changed, however she named it."""

import pytest

from diffalign import config as configs
from diffalign.errors import UserError
from diffalign.runs.resume import take_up

PREF = "rewards={shapes_pref: 1.0}"
SECTIONS = [
    ("flow_grpo/shapes-sd3", "rule.last_step", "weight=0.1"),
    ("flow_grpo/shapes-sd3", "rule.data", "count=64"),
    ("flow_grpo/shapes-sd3", "rule.risk", "bundle=2"),
    ("awm/shapes-sd3", "sampler.cache", "name=first_block"),
    ("awm/shapes-sd3", "prompts.scouts", "pool=32"),
    ("awm/shapes-sd3", "rule.kl_gate", "by=[shapes_judge]"),
]


def loaded(name, *more):
    judged = (
        ["rule.kl=0.1", "rewards={shapes_pref: 1.0, shapes_judge: 0.0}"] if any("kl_gate" in m for m in more) else []
    )
    return configs.load(name, [PREF, *judged, *more])


def taken(old, new):
    return take_up("run", configs.settings(old), configs.given(old), new, False)


@pytest.mark.parametrize(("name", "section", "key"), SECTIONS, ids=[section for _, section, _ in SECTIONS])
@pytest.mark.parametrize("how", ["by its key", "whole"])
def test_a_section_that_comes_or_goes_is_told(name, section, key, how):
    one, _, value = key.partition("=")
    given = f"{section}.{key}" if how == "by its key" else f"{section}={{{one}: {value}}}"
    within = loaded(name, given)
    without = loaded(
        name, *(["rule.kl=0.1", "rewards={shapes_pref: 1.0, shapes_judge: 0.0}"] if "kl_gate" in section else [])
    )
    for old, new in ((without, within), (within, without)):
        with pytest.raises(UserError) as caught:
            taken(old, new)
        told = [line for line in caught.value.problems if line.startswith(f"  {section}: ")]
        assert len(told) == 1 and ("None -> {" in told[0] or "} -> None" in told[0])
    assert taken(within, within).kept == {} and taken(within, within).changes == ()


def test_a_default_of_another_version_within_a_section_stays():
    """Named is the section alone: what its keys were is what the run goes on with."""
    new = loaded("flow_grpo/shapes-sd3", "rule.last_step={}")
    old = configs.settings(new)
    old["rule"]["last_step"]["weight"] = 0.5
    assert take_up("run", old, configs.given(new), new, False).kept == {"rule.last_step.weight": 0.5}
