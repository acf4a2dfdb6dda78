"""The reward really rises: whole runs of shipped configs, on noises and captions that training does not see."""

import pytest

from diffalign import config
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
