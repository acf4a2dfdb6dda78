"""The reward really rises: whole runs of shipped configs, on noises and captions that training does not see."""

import json

import pytest

from diffalign import config
from diffalign.models.notes import Notes
from diffalign.runs import session

# config -> the reward it is trained on
RUNS = {
    "truncated_bp/shapes-flux": "shapes_pref",  # 2 min 41 s; gains +0.177 and +0.128 for seeds 0 and 1
    "flow_grpo/shapes-wan": "shapes_motion_partial",  # 12 min beside three jobs; gains +0.047 and +0.063
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_shipped_config_raises_its_reward(name, tmp_path):
    summary = session.train(config.load(name, [f"run_dir={tmp_path / 'run'}"]), quiet=True)
    assert summary.rewards[RUNS[name]].gain.low > 0  # the 95 % interval of the paired gain


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_reward_that_is_tricked_raises_an_alarm_in_time_and_the_best_adapter_is_kept(seed, tmp_path):
    """`soft_colour` does not see shapes. Measured for these seeds: after update 25, gold 0.005 to 0.026 below its best."""
    run = tmp_path / "run"
    own = [
        "rewards={soft_colour: 1.0}",
        "rule.objective=linear",
        "rule.target=null",
        "optimizer.lr=1e-3",
        "evaluation.every=5",
    ]
    own += ["updates=60", "guard.stop=true", f"seed={seed}", f"run_dir={run}"]
    session.train(config.load("truncated_bp/shapes-sd3", own), quiet=True)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    gold = {row["update"]: row["eval/shapes_geneval"] for row in rows if "eval/shapes_geneval" in row}
    last, best = gold[max(gold)], max(gold.values())
    assert max(gold) < 60, "it was ended"
    assert best - last < 0.05
    assert last < best == gold[Notes.read(run / "best").updates]
