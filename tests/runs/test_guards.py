"""Alarms: raised where something goes wrong, once, and not in healthy runs."""

import json

import pytest

from diffalign import config as configs
from diffalign.config.limits import GuardConfig
from diffalign.evaluation.intervals import Interval
from diffalign.evaluation.results import Judged, Summary
from diffalign.runs.events import Began, Drawn, Evaluated, Updated
from diffalign.runs.folder import read_rows
from diffalign.runs.guards import WATCHES, Guards
from diffalign.runs.session import train
from diffalign.runtime import keys
from diffalign.types import Update

# Logged by the quickstart's config on 2026-11-27, as it is and with a hundredfold learning rate.
HEALTHY = [
    0.232,
    0.189,
    0.203,
    0.212,
    0.216,
    0.223,
    0.216,
    0.239,
    0.204,
    0.208,
    0.247,
    0.251,
    0.24,
    0.194,
    0.219,
    0.231,
]
BROKEN = [0.232, 0.257, 0.077, 0.075, 0.075, 0.076, 0.111, 0.131, 0.126, 0.097, 0.098, 0.097]


def told(rows, trained=("a",), last=5):
    said = []
    guards = Guards(trained, GuardConfig(last=last), said.append)
    guards.began(Began(0))
    for number, row in enumerate(rows, 1):
        guards.updated(Updated(number, 100, Update(), {keys.RATE: 1e-3, **row}))
    return guards, said


def test_pictures_that_become_alike_raise_an_alarm_once():
    guards, said = told([{keys.DIVERSITY: value} for value in BROKEN])
    assert list(guards.raised) == ["collapsed"] and guards.raised["collapsed"] == 7  # two, and five that are averaged
    assert said == [
        "update 7: pictures of a prompt have become alike (pictures/diversity 0.24 -> 0.08): go back to an earlier checkpoint, halve "
        "optimizer.lr, or raise rule.kl"
    ]
    assert told([{keys.DIVERSITY: value} for value in HEALTHY])[1] == []


def test_groups_without_spread_and_ratios_that_are_cut():
    assert list(told([{"groups_flat": 0.25}] * 3 + [{"groups_flat": 1.0}] * 5)[0].raised) == ["without_spread"]
    assert told([{"groups_flat": 0.75}] * 20)[1] == []
    assert list(told([{"clip_low": 0.5, "clip_high": 0.45}] * 8)[0].raised) == ["clipped"]
    assert told([{"clip_low": 0.25, "clip_high": 0.25}] * 20)[1] == []  # grpo_guard's preset cuts half


def judged(**found):
    """An evaluation where each reward has some paired change, both since the beginning and since its best."""
    changes = {name: Interval(sum(change) / 2, *change) for name, change in found.items()}
    return Evaluated(5, Summary(8, {name: Judged(Interval(0.5), change, change) for name, change in changes.items()}))


@pytest.mark.parametrize(
    ("found", "alarm"),
    [
        ({"a": (0.1, 0.2), "held": (-0.2, -0.1)}, True),
        ({"a": (0.1, 0.2), "held": (-0.2, 0.1)}, False),  # by no more than chance
        ({"a": (-0.1, 0.2), "held": (-0.2, -0.1)}, False),  # nothing rose
        ({"a": (0.1, 0.2), "b": (-0.2, -0.1)}, False),  # both are trained on: a trade
    ],
)
def test_a_held_out_reward_that_falls_while_the_trained_one_rises(found, alarm):
    guards, said = told([], trained=("a", "b"))
    guards.evaluated(judged(**found))
    assert said == []  # once may be chance: the best of several is
    guards.evaluated(judged(**found))
    assert bool(said) == alarm == ("hacked" in guards.raised)


def test_a_fall_that_is_made_good_in_between_is_none_and_one_before_a_stop_counts():
    fell, rose = judged(a=(0.1, 0.2), held=(-0.2, -0.1)), judged(a=(0.1, 0.2), held=(-0.1, 0.2))
    guards, said = told([], trained=("a",))
    for event in (fell, rose, fell, rose):
        guards.evaluated(event)
    assert said == []
    guards, said = told([], trained=("a",))
    for event in (judged(a=(0.1, 0.2), held=(-0.1, 0.05)), fell):  # less by chance, then by more
        guards.evaluated(event)
    assert len(said) == 1
    said = []
    guards = Guards(["a"], GuardConfig(), said.append, lambda: [fell.summary.row()])
    guards.began(Began(5))
    guards.evaluated(fell)
    assert len(said) == 1 and "held, which is held out, falls (-0.150 [-0.200, -0.100] since its best)" in said[0]


@pytest.mark.parametrize(
    ("key", "first", "later", "alarm"),
    [
        (keys.BLANK, 0.0, 0.2, "blank"),
        (keys.BLANK, 0.5, 0.55, None),  # it began so
        (keys.LATENT, 1.0, 2.1, "drifted"),
        (keys.LATENT, 1.0, 0.45, "drifted"),
        (keys.LATENT, 1.0, 1.45, None),  # what a liking for vivid colours did to a run whose gold rose too
        ("grad_norm", 0.1, 4.0, "steep"),
        ("grad_norm", 0.1, 2.0, None),
    ],
)
def test_what_an_update_logs_is_held_against_the_first_ones(key, first, later, alarm):
    guards, said = told([{key: first}] * 2 + [{key: later}] * 5)
    assert list(guards.raised) == ([alarm] if alarm else [])
    assert len(said) == bool(alarm)


@pytest.mark.parametrize(
    ("ratio", "radial", "rings"),
    [(1.19, -0.24, False), (0.5, 0.4, False), (1.21, 0.0, True), (1.0, -0.26, True)],
)
def test_predictions_that_have_left_the_references(ratio, radial, rings):
    """The mean of the last five updates: one alone that is far out is none. Where no reference is asked there is nothing to see."""
    usual, far = ({"norm_ratio": a, "norm_radial": b} for a, b in ((1.0, 0.0), (1.9, -0.9)))
    assert told([usual] * 5 + [far] + [usual] * 5)[1] == []
    guards, said = told([usual] * 5 + [{"norm_ratio": ratio, "norm_radial": radial}] * 5)
    assert guards.raised == ({"outgrown": 10} if rings else {})
    assert not rings or f"(norm_ratio {ratio:.2f}, norm_radial {radial:+.2f})" in said[0]
    assert told([{"kl": 1.0}] * 20)[1] == []


def test_pictures_that_have_nothing_left_of_the_first_ones():
    for drift, alarm in ((0.29, True), (0.04, False), (None, False)):
        guards, said = told([{keys.DIVERSITY: 0.24}] * 3)
        guards.drawn(Drawn(3, None, [], drift))
        assert bool(said) == alarm == ("replaced" in guards.raised)


def test_a_run_that_is_taken_up_is_compared_with_its_own_beginning():
    logged = [{"update": k, keys.RATE: 1e-3, keys.DIVERSITY: value} for k, value in enumerate(BROKEN[:4], 1)]
    said = []
    guards = Guards(["a"], GuardConfig(last=5), said.append, lambda: [*logged, {"update": 4, keys.DRIFT: 0.1}])
    guards.began(Began(4))
    for number, value in enumerate(BROKEN[4:7], 5):
        guards.updated(Updated(number, 100, Update(), {keys.RATE: 1e-3, keys.DIVERSITY: value}))
    assert guards.raised == {"collapsed": 7}


def test_of_nothing_nothing_is_said():
    seen = Guards([], GuardConfig(), print).seen
    assert all(watch(seen) == "" for watch in WATCHES.values())


SMALL = ("sampler.steps=3", "rule.window=null", "prompts.groups=2", "prompts.group_size=4", "optimizer.micro_batch=8")


def test_an_alarm_ends_a_run_that_says_so(tmp_path, capsys):
    """A learning rate that breaks the pictures within two updates."""
    own = [
        *SMALL,
        f"run_dir={tmp_path}",
        "updates=12",
        "optimizer.lr=0.5",
        "evaluation.enabled=false",
        "output.samples=2",
    ]
    train(configs.load("flow_grpo/shapes-sd3", [*own, "guard.stop=true", "guard.last=2"]))
    lines = capsys.readouterr().err
    updates = [row for row in read_rows(tmp_path) if keys.RATE in row]
    assert len(updates) < 12 and f"guard.stop: the run ends after update {len(updates)}; " in lines
    assert (tmp_path / "adapter").is_dir() and json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
