"""Prompts are read once, and what was read is what a run uses."""

import json
import sys
from pathlib import Path

import pytest

from diffalign import config
from diffalign.planning import cost
from diffalign.runs import session
from tests.kit.helpers import tiny_config

opened: list[str] = []
sys.addaudithook(lambda event, given: opened.append(str(given[0])) if event == "open" and given[1] == "r" else None)


@pytest.fixture
def files(tmp_path):
    """Prompts with their stages, of a file each."""
    prompts, staged = tmp_path / "mine.jsonl", tmp_path / "stages.jsonl"
    entries = [{"prompt": f"thing {k}"} for k in range(8)]
    prompts.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    staged.write_text("".join(json.dumps({**entry, "stages": ["coarse", entry["prompt"]]}) + "\n" for entry in entries))
    return prompts, staged


def given(prompts: Path, staged: Path) -> list[str]:
    return [
        f"prompts.source={prompts}",
        f"prompts.stages={staged}",
        "evaluation.stages=true",
        "rewards={jpeg_compressibility: 1.0}",
        "eval_rewards=[]",
    ]


def reads(path: Path) -> int:
    return opened.count(str(path))


def test_a_run_opens_each_of_its_prompt_files_once(files, tmp_path):
    session.train(tiny_config(tmp_path / "run", *given(*files)), quiet=True)
    assert [reads(path) for path in files] == [1, 1]


def test_what_was_checked_is_what_is_trained_planned_and_evaluated(files, tmp_path):
    made = tiny_config(tmp_path / "run", *given(*files))
    expected = made.book
    for path in files:
        path.write_text('{"prompt": "another", "stages": ["x", "y"]}\n')
    session.train(made, quiet=True)
    cost.count(made)
    logged = [json.loads(line) for line in (tmp_path / "run" / "scores.jsonl").read_text().splitlines()]
    assert {text for row in logged for text in row["prompt"]} <= {entry["prompt"] for entry in expected.training}
    judged = json.loads((tmp_path / "run" / "evaluation" / "update_000002.json").read_text())
    assert judged["prompts"] == [entry["prompt"] for entry in expected.evaluation]


def test_a_file_that_both_name_is_read_once(files):
    prompts, staged = files
    made = config.load("flow_grpo/shapes-sd3", [*given(prompts, staged), f"evaluation.source={prompts}"])
    assert reads(prompts) == 1
    assert made.book.training == made.book.evaluation
