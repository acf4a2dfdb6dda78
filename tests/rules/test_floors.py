"""`rule.floors`: a reward is kept above a least by a multiplier that grows while its mean is below."""

import json

import numpy as np
import pytest
import torch

from diffalign import config
from diffalign.backends.toy import ToyPolicy
from diffalign.errors import UserError
from diffalign.rewards.scorer import Scorer, Tally
from diffalign.rules import DDPO, RLR, RULES, FlowGRPO, TruncatedBP
from diffalign.rules._floors import PATIENCE, Floor
from diffalign.training.trainer import Trainer
from tests.kit.helpers import toy_prompts


def along(*direction):
    def reward(media, prompts):
        pixels = media.pixels.flatten(1)[:, :3]
        return pixels @ pixels.new_tensor(direction)

    return reward


UP, DOWN = along(1.0, 0.0, 0.0), along(-1.0, 0.3, 0.0)


def trainer(rule, said=None, weights=(1.0, 0.0), down=DOWN):
    policy = ToyPolicy()
    policy.micro_batch = 4
    policy.add_shadows(rule.decays(0))
    return Trainer(
        rule,
        policy,
        Scorer({"up": UP, "down": down}, dict(zip(("up", "down"), weights, strict=True))),
        torch.optim.SGD(policy.parameters.values(), lr=0.05),
        lambda update: toy_prompts(2, 4, 0, update),
        notify=(said if said is not None else []).append,
    )


FORMS = {
    "sum": lambda **s: FlowGRPO(FlowGRPO.Settings(**s)),
    "normalised": lambda **s: FlowGRPO(FlowGRPO.Settings(combine="normalised", **s)),
    "gdpo": lambda **s: FlowGRPO(FlowGRPO.Settings(combine="gdpo", **s)),
    "history": lambda **s: DDPO(DDPO.Settings(combine="normalised", **s)),
    "pathwise": lambda **s: TruncatedBP(TruncatedBP.Settings(**s)),
    "variants": lambda **s: TruncatedBP(TruncatedBP.Settings(variants=1, **s)),
    "rlr": lambda **s: RLR(RLR.Settings(depth=1, **s)),
}
every_form = pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)


def test_56_of_two_linear_rewards_in_conflict_one_goes_up_and_the_other_ends_at_its_floor():
    """A Gaussian whose mean is drawn back to 0: at the optimum of up + mu down it is up + mu down over the pull."""
    up, down, pull, least = np.array([1.0, 0.2]), np.array([-0.8, 0.6]), 0.5, -0.6
    rng, ends = np.random.default_rng(0), []
    mean, floor = np.zeros(2), Floor()
    for update in range(600):
        samples = mean + rng.normal(size=(256, 2))
        ends += [samples @ down] if update >= 400 else []
        floor = floor.after(samples @ down, least, rate=0.1, cap=10.0)
        mean = mean + 0.2 * (up + floor.multiplier * down - pull * mean)
    assert float(np.mean(ends)) == pytest.approx(least, rel=0.05)
    alone = up / pull
    assert alone @ down < 2 * least  # without the floor
    expected = (least * pull - up @ down) / (down @ down)  # where (up + mu down) down / pull = least
    assert floor.multiplier == pytest.approx(expected, rel=0.1)


@every_form
def test_57_a_floor_that_never_binds_is_a_reward_of_weight_0_bit_for_bit(make):
    found = []
    for asked in ({}, {"floors": {"down": -100.0}}):
        made = trainer(make(**asked))
        rows = [made.update(index).row() for index in range(3)]
        found.append(made.policy.delta.detach().clone())
    assert torch.equal(*found)
    assert rows[-1]["multiplier/down"] == 0
    assert rows[-1]["slack/down"] == rows[-1]["floor_mean/down"] + 100


@every_form
def test_58_who_goes_on_has_the_multipliers(make):
    def run(stop_at):
        rule = make(floors={"down": 0.5}, floor_rate=0.3)
        made = trainer(rule)
        for index in range(4):
            if index == stop_at:
                kept, state = made.policy.delta.detach().clone(), json.loads(json.dumps(rule.state_dict()))
                rule = make(floors={"down": 0.5}, floor_rate=0.3)
                rule.load_state_dict(state)
                made = trainer(rule)
                made.policy.delta.data.copy_(kept)
            made.update(index)
        return made.policy.delta.detach().numpy(), rule.floors

    (one, floors), (other, again) = run(2), run(None)
    np.testing.assert_array_equal(one, other)
    assert floors == again
    assert floors["down"].multiplier > 0.3


@every_form
def test_59_a_multiplier_is_a_weight_of_the_next_update(make):
    rule = make(floors={"down": 0.5}, floor_rate=0.3)
    made = trainer(rule)
    row = made.update(0).row()
    multiplier = row["multiplier/down"]
    assert multiplier == rule.floors["down"].multiplier > 0
    if make is not FORMS["variants"]:  # which logs the mean over variants; a floor is of what was sampled
        assert row["floor_mean/down"] == pytest.approx(row["reward/down"], rel=1e-12)
    made.gradient(1)
    assert rule.floors["down"].multiplier == multiplier  # nothing but an update moves it
    plain = trainer(make(), weights=(1.0, multiplier))
    plain.policy.delta.data.copy_(made.policy.delta.data)
    plain.rule.load_state_dict({**rule.state_dict(), "floors": {}})
    plain.gradient(1)
    assert torch.equal(made.policy.delta.grad, plain.policy.delta.grad)
    nothing = trainer(make(), weights=(1.0, 0.0))
    nothing.policy.delta.data.copy_(made.policy.delta.data)
    nothing.rule.load_state_dict({**rule.state_dict(), "floors": {}})
    nothing.gradient(1)
    assert not torch.equal(made.policy.delta.grad, nothing.policy.delta.grad)


def test_59_below_it_grows_above_it_falls_and_it_stays_between_0_and_its_cap():
    scores = np.array([1.0, 2.0, 3.0, 6.0])  # mean 3, std sqrt(14 / 4)
    step = 0.1 * 2 / np.sqrt(14 / 4)
    assert Floor(1.0).after(scores, 5.0, 0.1, 10.0).multiplier == pytest.approx(1 + step)
    assert Floor(1.0).after(scores, 1.0, 0.1, 10.0).multiplier == pytest.approx(1 - step)
    assert Floor(0.01).after(scores, 1.0, 0.1, 10.0).multiplier == 0
    assert Floor(9.99).after(scores, 5.0, 0.1, 10.0).multiplier == 10
    later = Floor(1.0, mean=10.0, std=1.0).after(scores, 5.0, 0.1, 10.0)
    assert (later.mean, later.std) == (pytest.approx(9.3), pytest.approx(0.9 + 0.1 * np.sqrt(14 / 4)))
    assert Floor(1.0).after(np.full(4, 2.0), 5.0, 0.1, 10.0).multiplier == 1  # no std to measure by


def test_60_what_has_no_score_does_not_move_a_multiplier():
    scores = np.array([1.0, 2.0, 3.0, 6.0])
    holes = np.array([np.nan, 6.0, 1.0, np.nan, np.inf, 3.0, 2.0])
    assert Floor().after(holes, 5.0, 0.1, 10.0) == Floor().after(scores, 5.0, 0.1, 10.0)  # nor the order
    before = Floor(1.0, 2.0, 3.0, 4)
    assert before.after(np.full(3, np.nan), 5.0, 0.1, 10.0) == before


def test_60_nor_does_a_gradient_without_one():
    def holed(media, prompts):
        return torch.where(torch.arange(len(prompts)) == 0, torch.nan, DOWN(media, prompts))

    rule = TruncatedBP(TruncatedBP.Settings(floors={"down": 0.5}))
    row = trainer(rule, down=holed).update(0).row()
    assert row["invalid/down"] == 2  # the first of each micro-batch
    assert row["floor_mean/down"] == pytest.approx(row["reward/down"], rel=1e-12)
    assert 0 < row["multiplier/down"] < 10


def test_scores_of_several_processes_are_put_together():
    parts = [Tally(2, 1), Tally(2)]
    parts[0].note("a", [1.0, float("nan")])
    parts[1].note("b", [2.0, 3.0])
    whole = parts[0].joined(parts[1])
    assert (whole.asked, whole.unscored, whole.missing["a"], whole.missing["b"]) == (4, 1, 1, 0)
    assert whole.values["b"] == [2.0, 3.0]
    rng = np.random.default_rng(0)
    values = rng.normal(size=101) * 10.0 ** rng.integers(-8, 8, 101)
    found = {Floor().after(rng.permutation(values), 5.0, 0.1, 10.0) for _ in range(20)}
    assert len(found) == 1  # to the last bit


def test_a_floor_that_does_not_hold_is_said_once():
    said: list[str] = []
    rule = TruncatedBP(TruncatedBP.Settings(floors={"down": 5.0}, floor_cap=1e-3))
    made = trainer(rule, said)
    for index in range(PATIENCE + 5):
        made.update(index)
        if index == PATIENCE + 1:  # nor once more after a resume
            rule.load_state_dict(json.loads(json.dumps(rule.state_dict())))
    told = [line for line in said if "rule.floors" in line]
    assert told == [
        "update 10: rule.floors: down has stayed below 5 with its multiplier at rule.floor_cap; "
        "lower the floor, raise rule.floor_cap, or lower other weights"
    ]


def test_it_counts_updates_in_a_row_until_it_is_said_and_is_never_said_again():
    short, enough = np.array([0.0, 1.0]), np.array([8.0, 9.0])
    at_cap = Floor(1.0, 0.5, 0.5, 3)
    assert at_cap.after(short, 5.0, 0.1, 1.0).stuck == 4
    assert at_cap.after(short, 5.0, 0.1, 2.0).stuck == 0  # not at its cap
    assert Floor(1.0, 8.0, 0.5, 3).after(enough, 5.0, 0.1, 1.0).stuck == 0
    assert Floor(1.0, 8.0, 0.5, PATIENCE).after(enough, 5.0, 0.1, 1.0).stuck == PATIENCE


def test_units_are_of_floors_too():
    rule = FlowGRPO(FlowGRPO.Settings(floors={"down": 0.5}, unit="auto"))
    made = trainer(rule)
    made.update(0)
    assert 0 < rule.units["down"] < 1
    assert rule.weighed({"up": 1.0, "down": 0.0})["down"] == rule.floors["down"].multiplier / rule.units["down"]


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if "floors" in rule.Settings.model_fields])
def test_a_state_without_floors_is_one_before_they_moved(name):
    rule = RULES[name]()
    state = rule.state_dict()
    assert "floors" not in state
    again = RULES[name](RULES[name].Settings(floors={"a": 1.0}))
    again.load_state_dict(state)
    assert again.floors == {"a": Floor()}


def test_floors_that_cannot_be_are_told_before_anything_loads():
    two = "rewards={shapes_geneval: 1, shapes_judge: 0}"
    made = config.load("flow_grpo/shapes-sd3", [two, "rule.floors={shapes_judge: 0.3}"]).make_rule()
    assert made.least == {"shapes_judge": 0.3}
    for name, more, message in (
        (
            "flow_grpo",
            ["rule.floors={nothing: 1}"],
            "rule.floors: got 'nothing', allowed are rewards of this run: shapes_gen",
        ),
        ("flow_grpo", ["rule.floor_cap=2"], "rule.floor_cap: got 2.0, has no effect without rule.floors"),
        ("ddpo", [two, "rule.floors={shapes_judge: 1}"], "rule.floors: got .* with combine sum, a prompt's history"),
        (
            "truncated_bp",
            ["rewards={shapes_judge: 1}", "rule.floors={shapes_judge: 1}", "rule.objective=hinge", "rule.target=1"],
            "rule.floors: got .* with objective hinge",
        ),
    ):
        with pytest.raises(UserError, match=message):
            config.load(f"{name}/shapes-sd3", more)
    with pytest.raises(UserError, match="rule.floors: got 'c', allowed are this run's rewards: up, down"):
        trainer(FlowGRPO(FlowGRPO.Settings(floors={"c": 1.0}))).update(0)


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if "floors" in rule.Settings.model_fields])
def test_rates_of_floors_that_are_not_there_are_refused_by_every_rule(name):
    problems = RULES[name].Settings(floor_rate=0.2, floor_cap=5.0).problems(10)
    assert {line.partition(":")[0] for line in problems} >= {"rule.floor_rate", "rule.floor_cap"}
