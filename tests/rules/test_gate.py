"""A divergence on the samples alone that the trained reward likes and others do not."""

import json

import numpy as np
import pytest
import torch

from diffalign import config as configs
from diffalign.backends.toy import ToyPolicy, toy_reward
from diffalign.errors import UserError
from diffalign.rewards.scorer import Scorer
from diffalign.rules import AWM, NFT, BranchGRPO, FlowGRPO, GRPOGuard
from diffalign.rules._gate import Gate, held, overrated, win_rates
from diffalign.types import Scores
from tests.kit.helpers import toy_trainer

ALL = np.ones(8, bool)
GROUP = np.repeat([0, 1], 4)


def scores(trained, *others, valid=ALL) -> Scores:
    by_name = {f"aux{k}": np.asarray(each, float) for k, each in enumerate(others)}
    return Scores({"toy": np.asarray(trained, float), **by_name}, np.asarray(trained, float), valid)


def test_35_what_the_trained_reward_alone_loves_is_held_and_its_mirror_never():
    """Row 0 is loved by the trained reward and hated by both others, row 7 the other way round. The published sign holds row 7."""
    trained = [9, 2, 3, 4, 5, 6, 7, 0]
    made = scores(trained, [0, 2, 3, 4, 5, 6, 7, 9], [-1, 2, 3, 4, 5, 6, 7, 8])
    apart = overrated(made, ["aux0", "aux1"], GROUP)
    assert apart[0] == 1 and apart[7] == -1
    weights = held(apart, 1 / 8)
    np.testing.assert_array_equal(weights, [8, 0, 0, 0, 0, 0, 0, 0])
    assert held(apart, 0.9)[7] == 0


def test_36_how_hard_a_prompt_is_changes_nothing():
    rng = np.random.default_rng(0)
    trained, one, two = rng.normal(size=(3, 8))
    hard = np.where(GROUP == 1, -7.0, 0.0)
    plain = overrated(scores(trained, one, two), ["aux0", "aux1"], GROUP)
    for made in (scores(trained + hard, one, two + 3 * hard), scores(np.exp(trained), one + hard, two)):
        np.testing.assert_array_equal(overrated(made, ["aux0", "aux1"], GROUP), plain)


def test_win_rates_are_those_of_every_pair():
    values, valid = np.array([1.0, 1.0, 3.0, 0.0, 2.0, 2.0, 2.0, 9.0]), np.arange(8) != 7
    found = win_rates(values, GROUP, valid)
    for row in range(7):
        others = [k for k in range(7) if k != row and GROUP[k] == GROUP[row]]
        beaten = [(values[row] > values[k]) + 0.5 * (values[row] == values[k]) for k in others]
        assert found[row] == pytest.approx(np.mean(beaten))
    assert found[7] == 0.5


def test_nothing_is_held_where_nothing_is_overrated():
    same = scores(np.arange(8.0), np.arange(8.0))
    assert not held(overrated(same, ["aux0"], GROUP), 0.5).any()


def test_the_share_follows_what_is_overrated_and_stays_between_its_ends():
    gate = Gate(0.1).after(0.5)
    assert gate == Gate(0.1, (0.5,))  # there is nothing yet to hold the first against
    assert gate.after(0.6).share == pytest.approx(0.11)
    assert gate.after(0.4).share == pytest.approx(0.09)
    assert gate.after(0.6).after(0.55).share == pytest.approx(0.11)
    for mean, end in ((1.0, 0.2), (-1.0, 0.02)):
        moved = Gate(0.1, (0.0,))
        for k in range(40):
            moved = moved.after(mean * (k + 1))
        assert moved.share == end and len(moved.past) == 20


# -- in the rules

FORMS = {
    "flow_grpo": lambda **more: FlowGRPO(FlowGRPO.Settings(**more)),
    "fan": lambda **more: FlowGRPO(FlowGRPO.Settings(fan=2, kl_space="mean", **more)),
    "grpo_guard": lambda **more: GRPOGuard(GRPOGuard.Settings(**more)),
    "branch_grpo": lambda **more: BranchGRPO(BranchGRPO.Settings(splits=(0, 1), **more)),
    "awm": lambda **more: AWM(AWM.Settings(**more)),
    "nft": lambda **more: NFT(NFT.Settings(**more)),
}
every_form = pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
GATE = {"share": 0.25, "by": ["aux"], "adapt": False}


def aux(media, prompts):
    return media.pixels.flatten(1)[:, 1] - media.pixels.flatten(1)[:, 0]


def trainer(rule, micro_batch: int = 0):
    policy = ToyPolicy()
    with torch.no_grad():
        policy.delta.add_(0.1)  # away from the reference
    made = toy_trainer(rule, policy, 2, 8, micro_batch=micro_batch)
    made.scorer = made.sampling.scorer = Scorer({"toy": toy_reward, "aux": aux}, {"toy": 1.0, "aux": 0.0})
    return made


def moved(rule, updates: int = 2, micro_batch: int = 0) -> torch.Tensor:
    made = trainer(rule, micro_batch)
    for index in range(updates):
        made.update(index)
    return made.policy.delta.detach().clone()


def slope(rule, micro_batch: int = 0) -> torch.Tensor:
    made = trainer(rule, micro_batch)
    made.gradient(0)
    return made.policy.delta.grad.clone()


@every_form
def test_37_its_gradient_does_not_depend_on_the_micro_batch(make):
    whole, parts = (slope(make(kl=0.5, kl_gate=GATE), size) for size in (16, 2))
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-12)
    assert not torch.allclose(whole, slope(make(kl=0.5)), atol=1e-6)


@every_form
def test_39_a_share_of_1_is_plain_kl_bit_for_bit(make):
    gate = {**GATE, "share": 1.0}
    assert torch.equal(moved(make(kl=0.5, kl_gate=gate)), moved(make(kl=0.5)))


def test_it_is_the_kl_of_the_held_rows_over_the_share():
    """With rewards out of the way: the gradient of kl on the held rows alone, by their number among all."""
    part = trainer(AWM(AWM.Settings(kl=1.0, times=1, kl_gate=GATE)))
    sampled = part._sample(0, _clock())
    weights = sampled.credit.rows["held"]
    assert set(weights) == {0.0, 4.0} and weights.sum() <= len(weights)
    scored = sampled.update.judged[1]
    assert scored.weights == {"toy": 1.0, "aux": 0.0}
    with_kl, without = (slope(AWM(AWM.Settings(kl=kl, times=1, anchor=0.0, **more))) for kl, more in _KL)
    rows = np.flatnonzero(weights)
    term, policy = sampled.rollout.plan.updates[0][0], part.policy
    x0, k = sampled.rollout.x[-1][rows], term.start
    from diffalign.rules import _forward

    at = _forward.noised(term, policy, sampled.rollout.select(rows))
    delta = policy.delta.detach().clone().requires_grad_()
    time = torch.full((len(x0), 1), float(policy.schedule.sigma[k]), dtype=x0.dtype)
    seen = torch.cat([at.x, time, torch.ones_like(time)], 1)
    ((seen @ delta.T) ** 2).mean(1).sum().mul(4 / len(weights)).backward()
    torch.testing.assert_close(with_kl - without, delta.grad, rtol=1e-9, atol=1e-12)


_KL = ((1.0, {"kl_gate": GATE}), (0.0, {}))


def _clock():
    from diffalign.training.scoring import Clock

    return Clock(torch.device("cpu"))


def test_who_goes_on_has_the_share_and_what_it_is_held_against():
    def rule():
        return FlowGRPO(FlowGRPO.Settings(kl=0.5, kl_gate={"share": 0.1, "by": ["aux"]}))

    def run(stop_at):
        made = trainer(rule())
        for index in range(5):
            if index == stop_at:
                again = rule()
                again.load_state_dict(json.loads(json.dumps(made.rule.state_dict())))
                kept = made.policy.delta.detach().clone()
                optimizer = made.optimizer.state_dict()
                made = trainer(again)
                made.policy.delta.data.copy_(kept)
                made.optimizer.load_state_dict(optimizer)
            row = made.update(index).row()
        return made.policy.delta.detach(), made.rule.gate, row["gate_share"]

    (one, gate, share), (other, same, _) = run(3), run(None)
    assert torch.equal(one, other) and gate == same
    assert len(gate.past) == 5 and share != 0.1


BASE = ["rule.kl=0.1", "rewards={shapes_geneval_partial: 1, shapes_judge: 0}"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("rule.kl=0", r"rule.kl_gate: got .*, has no effect without rule.kl"),
        (
            "rule.kl_gate.by=[ocr]",
            "rule.kl_gate.by: got 'ocr', allowed are this run's rewards of weight 0: shapes_judge",
        ),
        ("rule.kl_gate.by=[shapes_geneval_partial]", "rule.kl_gate.by: got 'shapes_geneval_partial', allowed are"),
        (
            "rule.kl_gate.share=1",
            "rule.kl_gate.share: got 1, one that adapts is in .*; allowed is that, or adapt: false",
        ),
        ("prompts.group_size=1", "prompts.group_size: got 1, rule.kl_gate compares samples of a group"),
    ],
)
def test_what_cannot_be_is_refused(change, said):
    gate = "rule.kl_gate={share: 0.1, by: [shapes_judge]}"
    assert configs.load("awm/shapes-sd3", [*BASE, gate]).make_rule().gate == Gate(0.1)
    with pytest.raises(UserError, match=said):
        configs.load("awm/shapes-sd3", [*BASE, gate, change])


def test_a_gate_without_a_divergence_is_said_in_plain_data():
    with pytest.raises(UserError) as caught:
        configs.load("awm/shapes-sd3", ["rewards.shapes_judge=0", "rule.kl_gate={by: [shapes_judge]}"])
    assert (
        "rule.kl_gate: got {'share': 0.1, 'by': ['shapes_judge'], 'adapt': True}, has no effect without rule.kl"
        in str(caught.value)
    )
