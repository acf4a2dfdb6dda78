"""What `plan` says first, and cards by the names people use."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from diffalign import config as configs
from diffalign.cli import app
from diffalign.errors import UserError
from diffalign.planning import bounds, cards, remarks
from diffalign.runtime.words import duration, folded
from diffalign.types import Plan, Term


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        *((name, "RTX 4090") for name in ("RTX 4090", "rtx4090", "4090", "NVIDIA GeForce RTX 4090", "rtx-4090")),
        *((name, "A100") for name in ("a100", "A100-80GB", "NVIDIA A100-SXM4-80GB", "A100 SXM4 80GB")),
        ("A100 40GB", "A100 40GB"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("nvidia h100 80GB", "H100"),
        ("4070 ti super", "RTX 4070 Ti Super"),
        ("rtx 3060 12gb", "RTX 3060"),
        ("RTX 4060 Ti 16 GB", "RTX 4060 Ti 16GB"),
    ],
)
def test_cards_go_by_the_names_people_use(name, meant):
    assert cards.find(name).name == meant


def test_every_card_is_found_by_its_own_name_and_none_twice():
    assert all(cards.find(card.name) is card for card in cards.CARDS.values())
    assert all(card.memory > 0 and (card.rate is None or card.rate > 1e13) for card in cards.CARDS.values())


def test_a_card_that_is_not_known_is_refused_in_one_line():
    with pytest.raises(
        UserError, match="^--card: got '4099'; did you mean RTX 4090; for any other: --vram with its memory$"
    ):
        cards.find("4099")


def plan(*words):
    done = CliRunner().invoke(app, ["plan", *words])
    assert done.exit_code == 0, done.output
    return done.output.splitlines()


def test_plan_begins_with_whether_it_fits_and_how_long_it_takes():
    first, chosen, time, *rest = plan("ddpo/sd15", "--card", "4090", "updates=100")
    assert (
        first.startswith("fits        24 GiB: ") and "counted, not measured, while " in first and "(denoiser " in first
    )
    assert chosen.startswith("with        ")
    assert " on a RTX 4090 (165.0 TFLOP/s by its data sheet); 100 updates " in time
    assert "; networks measured on an H200 took 2.9 to 4.8 times such a bound: here " in time
    assert rest[0].startswith("memory      ")
    lines = plan("ddpo/sd15")
    assert lines[0].startswith("time        not known without a card whose rate is: --card 4090; ")
    assert lines[1].startswith("memory      ") and "counted, not measured" in lines[1]


def test_plan_needs_no_reward_installed(monkeypatch):
    monkeypatch.setattr("diffalign.rewards.catalog.missing", lambda module: f"pip install {module}")
    with pytest.raises(UserError, match="pickscore needs open_clip"):
        configs.load("flow_grpo/sd35-medium")
    assert configs.load("flow_grpo/sd35-medium", ready=False).rewards == {"pickscore": 1.0}


def test_what_is_repeated_is_one_line():
    each = tuple(Term(k, k + 1, "log_prob", 0.25) for k in range(4))
    made = dataclasses.replace(Plan.deterministic(4), updates=(each, each, (Term(0, 4, "reward"),), each))
    assert remarks.steps(made) == [
        "steps 1 to 2: log_prob of each of the steps 0 to 3 x 0.25",
        "step 3      reward[0,4) x 1",
        "step 4      log_prob of each of the steps 0 to 3 x 0.25",
    ]
    apart = (*each[:2], each[3], Term(0, 1, "log_prob", 0.5))
    assert remarks.steps(dataclasses.replace(made, updates=(apart,))) == [
        "step 1      log_prob of each of the steps 0 to 1 x 0.25, log_prob[3,4) x 0.25, log_prob[0,1) x 0.5"
    ]


@given(st.lists(st.integers(0, 30), unique=True).map(sorted))
def test_folded_numbers_are_the_numbers(numbers):
    text = folded(numbers)
    parts = [] if text == "none" else [part.split(" to ") for part in text.split(", ")]
    assert [n for part in parts for n in range(int(part[0]), int(part[-1]) + 1)] == numbers


@given(st.floats(0.05, 1e7))
def test_a_duration_is_read_within_five_percent(seconds):
    value, unit = duration(seconds).split(" ")
    read = float(value) * {"s": 1, "min": 60, "h": 3600, "days": 86400}[unit]
    assert math.isclose(read, seconds, rel_tol=0.05, abs_tol=0.051)  # rounded to a tenth


def test_durations():
    told = [duration(s) for s in (0.04, 9.94, 9.96, 99, 100, 600, 5969, 5971, 172_000, 180_000)]
    assert told == ["0.0 s", "9.9 s", "10 s", "99 s", "1.7 min", "10 min", "99 min", "1.7 h", "47.8 h", "2.1 days"]


def test_how_near_the_bound_a_card_came_is_what_was_measured():
    """Of the data sheet's rate, where the results are in numbers of the card's own product."""
    found = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "on_a_card.json").read_text())
    assert found["machine"]["device"] == "NVIDIA H200"
    rate = cards.find("H200").rate / 1e12
    for how, expected in ((", graphs", bounds.RECORDED), ("", bounds.EAGER)):
        times = [rate / row[what + how]["tflops"] for row in found["rows"] for what in ("sample", "train")]
        assert expected == (round(min(times), 1), round(max(times), 1))


@pytest.mark.parametrize(
    ("given", "times"),
    [
        (["ddpo/sdxl"], bounds.RECORDED),
        (["ddpo/sdxl", "speed=eager"], bounds.EAGER),
        (["ddpo/sdxl", "memory.quantize=int8"], None),
        (["flow_grpo/shapes-sd3"], None),
    ],
)
def test_a_factor_is_said_of_what_was_measured_alone(given, times):
    name, *overrides = given
    assert bounds.bound(configs.load(name, overrides, ready=False), cards.find("4090")).measured == times
