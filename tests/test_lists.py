"""What there is, as lists: presets, rules, rewards."""

import os

import pytest
from click.testing import CliRunner

from diffalign import config as configs
from diffalign.cli import app
from diffalign.rewards import catalog
from diffalign.rules import RULES


def told(*words, code=0):
    done = CliRunner().invoke(app, list(words))
    assert (done.exit_code == 0) == (code == 0), done.output
    return done.output.splitlines() if code == 0 else str(done.exception)


def test_every_preset_rule_and_reward_has_a_line_that_fits(monkeypatch):
    monkeypatch.setattr("shutil.get_terminal_size", lambda fallback: os.terminal_size((100, 24)))
    presets = told("configs")[1:]
    folder = next(folder for folder in configs.folders() if folder.is_dir())
    assert [line.split()[0] for line in presets] == sorted(
        str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml")
    )
    assert [line.split()[0] for line in told("rules")] == list(RULES)
    rewards = told("rewards")
    assert [line.split()[0] for line in rewards[1:-2]] == list(catalog.builtin())
    assert all(len(line) <= 100 for line in [*presets, *told("rules"), *rewards])


def test_presets_are_found_by_words():
    assert {line.split()[0] for line in told("configs", "FLUX.1-dev", "truncated")[1:]} == {"truncated_bp/flux-dev"}
    assert "no preset has flux and wan" in told("configs", "flux", "wan", code=1)


@pytest.mark.parametrize("name", catalog.builtin())
def test_all_is_said_of_a_reward(name):
    entry, lines = catalog.find(name), told("rewards", name)
    text = "\n".join(lines)
    assert entry.about in text and f"rewards check {name}" in text
    assert all(part in text for part in (entry.weights, entry.licence, entry.range))


def test_a_reward_that_is_not_there_is_refused():
    assert "rewards: pickscor: " in told("rewards", "pickscor", code=1) and "pickscore" in told(
        "rewards", "pickscor", code=1
    )
