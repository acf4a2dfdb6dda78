"""How far a run goes: to its last whole update within its budget, also if it is taken up in between."""

import json

import pytest
from safetensors.torch import load_file

from diffalign.errors import Fault, UserError
from diffalign.runs import session
from diffalign.runs.budget import Budget, Spent
from diffalign.runs.events import Updated
from diffalign.runs.folder import read_rows
from diffalign.runs.progress import Reporter
from diffalign.types import Update
from tests.kit.helpers import tiny_config


def after(updates: int, rows: float = 40.0, calls: int = 4, seconds: float = 0.5) -> Spent:
    """What so many equal updates take."""
    return Spent(updates, updates * rows, updates * calls, updates * seconds)


@pytest.mark.parametrize(
    ("budget", "total", "share"),
    [
        (Budget(7), 7, ""),
        (Budget(100, rows=120.0), 3, "67 % of 120 rows"),
        (Budget(100, rows=119.9), 2, "67 % of 119.9 rows"),
        (Budget(100, reward_calls=4000), 100, ""),
        (Budget(1000, reward_calls=3999), 999, "0 % of 3,999 reward calls"),
        (Budget(1000, rows=4000.0, seconds=2.0), 4, "50 % of 2 seconds"),
    ],
)
def test_a_budget_reaches_to_the_last_whole_update_within_all_limits(budget, total, share):
    for done in range(1, total):
        assert budget.allows(after(done))
    assert not budget.allows(after(total))
    assert budget.reach(after(2))[0] == total
    assert budget.share(after(2)) == share
    assert budget.allows(Spent())


def test_what_costs_nothing_ends_no_run():
    assert Budget(10, rows=5.0).reach(Spent(3)) == (10, "updates")
    assert Budget(rows=5.0).allows(Spent())


def test_a_person_sees_how_much_is_spent(capsys):
    reporter = Reporter()
    row = {"seconds/total": 0.5}
    reporter.updated(Updated(12, 38, Update(), row, "31 % of 40,000 rows"))
    assert "update 12/38 (31 % of 40,000 rows)  reward - " in capsys.readouterr().err


# A reward that tells any two pictures apart: an update that is skipped, since all are equal, takes fewer rows.
SMALL = ("rewards={jpeg_compressibility: 1}", "output.samples=1", "evaluation.prompts=2")


def trained(folder, *overrides: str) -> list[dict]:
    session.train(tiny_config(folder, *SMALL, *overrides), quiet=True)
    return read_rows(folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Three updates, and the rows of one."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    rows = trained(folder, "updates=3", "evaluation.every=2")
    (each,) = {row["nfe"] + 2 * row["nfe_backward"] for row in rows if "nfe" in row}
    return folder, each


def test_evaluations_say_what_was_spent_up_to_them(plain):
    folder, each = plain
    rows = read_rows(folder)
    spent = {row["update"]: row for row in rows if "eval/n" in row}
    assert [(k, row["spent/rows"], row["spent/reward_calls"]) for k, row in spent.items()] == [
        (k, k * each, k * 4) for k in (0, 2, 3)
    ]
    seconds = sum(row["seconds/total"] for row in rows if row["update"] <= 2 and "nfe" in row)
    assert spent[2]["spent/seconds"] == pytest.approx(seconds)


def test_a_run_ends_at_its_last_whole_update_within_and_goes_on_with_more(plain, tmp_path):
    folder, each = plain
    run, endless = tmp_path / "run", ("updates=1000000", "evaluation.every=2")
    for rows, count in ((2.5 * each, 2), (2.9 * each, 2), (3 * each, 3)):  # the second begins and has nothing to do
        found = trained(run, *endless, f"budget.rows={rows}")
        assert [row["update"] for row in found if "nfe" in row] == list(range(1, count + 1))
        assert (run / f"samples/update_00000{count}.png").is_file(), (
            "the end is drawn, also where an evaluation was due"
        )
    adapters = [load_file(each / "adapter" / "pytorch_lora_weights.safetensors") for each in (run, folder)]
    assert all((adapters[0][name] == adapters[1][name]).all() for name in adapters[1])
    evaluations = [json.loads((each / "evaluation/update_000003.json").read_text())["scores"] for each in (run, folder)]
    assert evaluations[0] == evaluations[1]
    with pytest.raises(
        UserError, match=f"budget.rows: got 5, .* has done {3 * each:g}; allowed is {3 * each:g} or more"
    ):
        trained(run, *endless, "budget.rows=5")


def test_a_budget_below_one_update_is_said(plain, tmp_path):
    with pytest.raises(Fault, match=f"budget.rows: got 5, the first update took {plain[1]:g}; allowed is that or more"):
        trained(tmp_path / "run", "budget.rows=5", "evaluation.enabled=false")
    assert [row for row in read_rows(tmp_path / "run") if "nfe" in row] == []
    with pytest.raises(UserError, match="budget.reward_calls: got 3, an update scores 4; allowed is that or more"):
        tiny_config(tmp_path / "run", "budget.reward_calls=3")
