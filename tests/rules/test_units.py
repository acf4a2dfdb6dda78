"""`rule.unit: auto`: what a reward is measured in does not matter, it is measured once, within prompts, and kept."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffalign import config
from diffalign.backends.toy import ToyPolicy, toy_reward
from diffalign.errors import UserError
from diffalign.ops import advantages
from diffalign.rewards.scorer import Scorer
from diffalign.rules import RLR, RULES, FlowGRPO, TruncatedBP
from diffalign.runs import session
from diffalign.training.scoring import Clock
from diffalign.training.trainer import Trainer
from diffalign.types import Plan
from tests.kit.helpers import checkpoints, saved_state, tiny_config, toy_prompts


def trainer(rule, rewards, weights=None):
    policy = ToyPolicy(steps=5)
    policy.micro_batch = 8
    policy.add_shadows(rule.decays(0))
    return Trainer(
        rule,
        policy,
        Scorer(rewards, weights),
        torch.optim.SGD(policy.parameters.values(), lr=0.05),  # Adam's steps do not see scales
        lambda update: toy_prompts(4, 8, 0, update),
        max_grad_norm=1e9,  # nor does a shortened gradient
        notify=lambda line: None,
    )


def times(factor):
    def reward(media, prompts):
        return toy_reward(media, prompts) * factor

    return reward


def trained(rule, factor):
    made = trainer(rule, {"toy": times(factor)})
    rows = [made.update(index).row() for index in range(3)]
    return made.policy.delta.detach().numpy().copy(), rows


@pytest.mark.parametrize("kind", [TruncatedBP, RLR])
def test_a_reward_times_a_thousand_trains_the_same(kind):
    asked = {"unit": "auto"}
    (one, rows), (more, more_rows) = (trained(kind(kind.Settings(**asked)), factor) for factor in (1.0, 1000.0))
    np.testing.assert_allclose(more, one, rtol=1e-6)  # in float64, through a division by 1000 s
    assert more_rows[0]["reward/toy"] == pytest.approx(1000 * rows[0]["reward/toy"])  # what is logged is the reward
    plain, thousand = (trained(kind(), factor)[0] for factor in (1.0, 1000.0))
    assert np.abs(thousand - plain).max() > 10 * np.abs(plain - one).max()


def test_the_unit_is_the_mean_spread_within_prompts_before_training():
    """Not that over the batch, in which prompts differ, nor a later one."""
    rule = TruncatedBP(TruncatedBP.Settings(unit="auto"))

    def by_prompt(media, prompts):
        return toy_reward(media, prompts) + 100.0 * torch.as_tensor(prompts.group)

    made = trainer(rule, {"toy": by_prompt})
    made.update(0)
    unit = rule.units["toy"]
    first = trainer(TruncatedBP(), {"toy": toy_reward})
    prompts = first.draw(0)
    _, scores = first.sampling.run(prompts, Plan.deterministic(5), Clock.of(first.policy))
    values = scores.by_name["toy"].reshape(4, 8)
    assert unit == pytest.approx(values.std(1).mean(), rel=1e-9)
    made.update(1)
    assert rule.units == {"toy": unit}


def test_units_of_several_rewards_make_weights_mean_as_much():
    rule = FlowGRPO(FlowGRPO.Settings(unit="auto", scale="none"))
    made = trainer(rule, {"small": toy_reward, "large": times(50.0)}, {"small": 1.0, "large": 1.0})
    row = made.update(0).row()
    assert rule.units["large"] == pytest.approx(50 * rule.units["small"])
    assert row["share/small"] == pytest.approx(0.5)
    assert trainer(FlowGRPO(), {"small": toy_reward, "large": times(50.0)}).update(0).row()["share/large"] > 0.97


def test_a_reward_without_spread_is_told():
    rule = TruncatedBP(TruncatedBP.Settings(unit="auto"))
    made = trainer(rule, {"toy": toy_reward, "flat": lambda media, prompts: media.pixels.flatten(1)[:, 0] * 0 + 1})
    with pytest.raises(UserError, match=r"rule.unit: got auto, flat has no spread within the first update's prompts"):
        made.update(0)
    assert not rule.units


def test_one_sample_a_prompt_cannot_be_compared():
    with pytest.raises(UserError, match="prompts.group_size: got 1, rewards are compared within a group"):
        config.load("truncated_bp/shapes-sd3", ["rule.unit=auto", "prompts.group_size=1", "optimizer.micro_batch=1"])


def test_spread_leaves_out_what_has_no_score():
    reward = np.array([1.0, 3.0, np.nan, 5.0, 5.0, 5.0, 7.0, np.nan, np.nan])
    group = np.repeat([0, 1, 2], 3)
    assert advantages.spread(reward, group) == 0.5  # 1 of the first, 0 of the second; one sample says nothing
    assert np.isnan(advantages.spread(reward[6:], group[6:]))


@pytest.mark.parametrize("name", RULES)
def test_every_rule_keeps_its_units(name):
    rule, again = (RULES[name]() for _ in range(2))
    rule.units = {"a": 2.0}
    again.load_state_dict(json.loads(json.dumps(rule.state_dict())))
    assert again.units == {"a": 2.0}


def test_who_goes_on_does_not_measure_anew():
    def run(stop_at):
        rule = TruncatedBP(TruncatedBP.Settings(unit="auto"))
        made = trainer(rule, {"toy": toy_reward})
        for index in range(4):
            if index == stop_at:
                kept, state = made.policy.delta.detach().clone(), json.loads(json.dumps(rule.state_dict()))
                rule = TruncatedBP(TruncatedBP.Settings(unit="auto"))
                rule.load_state_dict(state)
                made = trainer(rule, {"toy": toy_reward})
                made.policy.delta.data.copy_(kept)
            made.update(index)
        return made.policy.delta.detach().numpy()

    np.testing.assert_array_equal(run(2), run(None))


@pytest.mark.slow  # three runs; the same with a toy is above
def test_a_resumed_run_has_the_unit_it_began_with(tmp_path):
    (tmp_path / "mine.py").write_text("def mean(media, prompts):\n    return media.pixels.flatten(1).mean(1)\n")
    rewards = f"rewards={{jpeg_compressibility: 1.0, {tmp_path}/mine.py:mean: 1.0}}"
    more = ["evaluation.enabled=false", rewards, "rule.unit=auto", "optimizer.lr=0.03"]

    def train(name, updates):
        folder = tmp_path / name
        session.train(tiny_config(folder, f"updates={updates}", *more), quiet=True)
        return load_file(folder / "adapter" / "pytorch_lora_weights.safetensors")

    expected = train("whole", 3)
    train("parts", 2)
    found = train("parts", 3)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    units = saved_state(checkpoints(tmp_path / "parts")[-1]).rule["units"]
    assert set(units) == {"jpeg_compressibility", f"{tmp_path}/mine.py:mean"}
