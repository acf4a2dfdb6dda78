"""What an evaluation found, as a record: its row and back, whatever rewards are called."""

import json

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign import config
from diffalign.evaluation.intervals import Interval
from diffalign.evaluation.results import Evaluation, Judged, Summary
from diffalign.runs import session
from diffalign.runs.folder import read_rows
from diffalign.runtime import keys
from tests.kit.helpers import tiny

endings = st.sampled_from(["", *keys.ENDINGS, "_lo_lo", "_gain_gain"])
words = st.one_of(st.text(min_size=1, max_size=6), st.sampled_from(["x", "n", "total", "valid", '"x"', "a/b"]))
names = st.builds(str.__add__, words, endings)
numbers = st.floats(-1e6, 1e6)
intervals = st.builds(Interval, numbers) | st.builds(Interval, numbers, numbers, numbers)
summaries = st.builds(
    Summary,
    st.integers(1, 10**6),
    st.dictionaries(names, st.builds(Judged, intervals, st.none() | intervals), max_size=6),
)


@settings(max_examples=300)
@given(summaries)
def test_a_row_is_read_back_as_what_it_was_written_from(summary):
    assert Summary.of_row(json.loads(json.dumps(summary.row()))) == summary


@settings(max_examples=300)
@given(st.lists(names, unique=True, max_size=6))
def test_rewards_means_are_told_apart_and_from_the_total(found):
    row = {keys.reward(name): 1.0 for name in found} | {keys.TOTAL: 2.0, keys.VALID: 1.0}
    assert len(row) == len(found) + 2
    assert list(keys.rewards(row).values()) == found


def test_an_update_s_row_holds_no_evaluation():
    assert Summary.of_row({"update": 3, "reward/x_lo": 0.5, "seconds/total": 1.0}) == Summary()


def test_ordinary_names_have_the_keys_that_older_runs_have():
    scores = {"gold": np.arange(12.0)}
    made = Evaluation(1, scores, np.arange(12)).summary(Evaluation(0, {"gold": np.zeros(12)}, np.arange(12)))
    row = made.row()
    ends = ("", "_lo", "_hi", "_gain", "_gain_lo", "_gain_hi")
    assert list(row) == ["eval/n", *(f"eval/gold{end}" for end in ends)]


def test_a_run_with_awkward_names_keeps_every_figure(tmp_path):
    """One would overwrite the other's low bound, one would be taken for a gain."""
    (tmp_path / "r.py").write_text(
        "def x(media, prompts):\n    return [float(v) for v in media.pixels.flatten(1).mean(1)]\n"
        "def x_lo(media, prompts):\n    return [-float(v) for v in media.pixels.flatten(1).mean(1)]\n"
        "def information_gain(media, prompts):\n    return [3.0 + k % 2 for k in range(len(prompts))]\n"
    )
    name = {f: f"{tmp_path / 'r.py'}:{f}" for f in ("x", "x_lo", "information_gain")}
    rewards = "{" + ", ".join(f"{json.dumps(n)}: 1.0" for n in name.values()) + "}"
    made = config.load(
        "flow_grpo/shapes-sd3",
        [*tiny("flow_grpo"), f"rewards={rewards}", "eval_rewards=[]", f"run_dir={tmp_path / 'run'}", "updates=1"],
    )
    summary = session.train(made, quiet=True)
    assert set(summary.rewards) == set(name.values())
    assert summary.rewards[name["x"]].value.value == -summary.rewards[name["x_lo"]].value.value > 0
    assert summary.rewards[name["information_gain"]].value.value == 3.5
    assert Summary.of_row(read_rows(tmp_path / "run")[-1]) == summary
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    for reward in name:  # by its file's name: where that lies is this machine's
        assert card.count("| " + keys.evaluated(f"r.py:{reward}").replace("_", "\\_") + " |") == 1, card
    assert str(tmp_path) not in card
