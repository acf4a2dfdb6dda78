"""Judges of the trained family are not held out: said at the start of a run, in an evaluation and on its page."""

from types import SimpleNamespace

import pytest

from diffalign.evaluation import found
from diffalign.rewards import catalog, families
from diffalign.runs.introducing import introduce
from diffalign.types import Prompts
from tests.kit.helpers import tiny_config


@pytest.mark.parametrize(
    ("judges", "trained", "warned"),
    [
        (["hpsv2.1"], ["hpsv2"], True),
        (["hpsv2.1", "imagereward"], ["hpsv2"], False),
        (["hpsv2.1", "pickscore"], ["hpsv2", "pickscore@./elsewhere"], True),
        (["pickscore@./elsewhere"], ["pickscore"], True),
        (["ocr_exact"], ["ocr"], True),
        (["./mine.py:f"], ["./mine.py:g"], False),  # of these nothing is known
        (["shapes_geneval"], ["shapes_geneval_partial"], False),  # a program that is right has no taste to be gamed
        ([], ["hpsv2"], False),
        (["hpsv2"], [], False),
    ],
)
def test_a_warning_where_every_judge_is_of_a_trained_family(judges, trained, warned):
    said = families.warning(judges, trained, "judge otherwise")
    assert bool(said) == warned
    if warned:
        assert all(f"{judge} ({families.mark(judge, trained)})" in said for judge in judges)
        assert said.endswith("a gain may be theirs alone: judge otherwise")


def test_what_was_trained_on_and_what_is_of_its_family_are_told_apart():
    assert [families.mark(judge, ["hpsv2"]) for judge in ("hpsv2", "hpsv2@x", "hpsv2.1", "clipscore")] == [
        families.TRAINED_ON,
        families.TRAINED_ON,
        families.IN_DOMAIN,
        "",
    ]


def test_learned_rewards_that_ship_have_a_family():
    """Those with weights learned from somewhere, and others may have learned from it too."""
    lacking = [name for name, entry in catalog.builtin().items() if entry.weights and not entry.family]
    assert lacking == []


def introduced(tmp_path, *overrides):
    """What a run says at its start, of what needs nothing loaded."""
    settings = tiny_config(tmp_path / "run", "evaluation.enabled=false", *overrides)
    place = SimpleNamespace(commit=None, file="")
    scorer = SimpleNamespace(rewards={})
    policy = SimpleNamespace(remarks=[], notify=None, schedule=SimpleNamespace(steps=10))
    parts = SimpleNamespace(place=place, policy=policy, scorer=scorer, judges=scorer, start=None, frozen=(), beside={})
    said = []
    introduce(settings, parts, Prompts([], *([[]] * 3), []), said.append)
    return [line for line in said if "family" in line]


def test_a_run_says_it_at_its_start(tmp_path):
    trained = "rewards={hpsv2: 1.0}"
    (line,) = introduced(tmp_path, trained, "eval_rewards=[hpsv2.1]")
    assert line.startswith("every judge is of a family that was trained on: hpsv2.1 (in domain); ")
    assert line.endswith("hold one of another family out too, eval_rewards")
    assert introduced(tmp_path, trained, "eval_rewards=[hpsv2.1, imagereward]") == []
    assert introduced(tmp_path, trained, "eval_rewards=[]") == []


def test_an_evaluation_says_it_of_every_adapter():
    task = SimpleNamespace(rewards=("hpsv2.1", "hpsv2"))
    assert "hpsv2.1 (in domain), hpsv2 (trained on)" in found.warning(task, ["hpsv2"])
    assert found.warning(task, []) == ""
