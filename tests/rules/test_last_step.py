"""A policy gradient with the reward's own beside it, through the last step alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffalign import config
from diffalign.backends.toy import ToyPolicy, toy_reward
from diffalign.errors import UserError
from diffalign.rewards.base import Wrapped
from diffalign.rewards.scorer import Scorer
from diffalign.rules import FlowGRPO, GRPOGuard, TruncatedBP
from diffalign.training.scoring import Clock
from diffalign.types import Term
from tests.kit.helpers import gradient, toy_prompts, toy_trainer

BOTH = pytest.mark.parametrize("kind", [FlowGRPO, GRPOGuard])
CPU = torch.device("cpu")


def rule(kind=FlowGRPO, **given):
    return kind(kind.Settings(last_step={"weight": 0.3, **given}))


def rolled(kind, policy, given):
    trainer = toy_trainer(kind(), policy)
    trainer.draw = lambda _: given
    return trainer._sample(0, Clock(CPU)).rollout


@BOTH
@pytest.mark.parametrize("ceiling", [None, 0.35])
def test_the_gradient_is_the_policys_and_so_much_of_the_last_steps(kind, ceiling):
    """The second from truncated_bp's loss, on the same rollout."""
    given = toy_prompts(3, 6)
    policy = ToyPolicy()
    total = gradient(rule(kind, ceiling=ceiling), policy, given)
    alone = gradient(kind(), policy, given)
    part = rolled(kind, policy, given)
    objective = {} if ceiling is None else {"objective": "hinge", "target": ceiling}
    other = TruncatedBP(TruncatedBP.Settings(**objective))
    policy.delta.grad = None
    term = Term(3, 4, "reward")
    part = replace(part, plan=replace(part.plan, updates=((term,),)))
    loss = other.loss(term, policy, part, None, lambda media: toy_reward(media, given))
    if ceiling is not None:
        assert 0 < loss.metrics["below_target"] < 1  # some pull, and some do not
    loss.value.backward()
    np.testing.assert_allclose(total, alone + 0.3 * policy.delta.grad.numpy(), rtol=1e-10, atol=1e-13)
    assert np.abs(total - alone).max() > 1e-3


@BOTH
def test_above_the_ceiling_nothing_pulls(kind):
    given = toy_prompts(3, 6)
    plain = gradient(kind(), ToyPolicy(), given)
    np.testing.assert_array_equal(gradient(rule(kind, ceiling=-100.0), ToyPolicy(), given), plain)


@pytest.mark.parametrize("micro_batch", [1, 3, 6])
@pytest.mark.parametrize("more", [{}, {"inner_updates": 2}, {"fan": 3}, {"window_steps": 1, "window_by": "prompt"}])
def test_the_cut_into_micro_batches_changes_nothing(micro_batch, more):
    given = toy_prompts(3, 6)
    make = lambda: FlowGRPO(FlowGRPO.Settings(last_step={"weight": 0.3}, **more))  # noqa: E731
    whole = gradient(make(), ToyPolicy(), given)
    np.testing.assert_allclose(gradient(make(), ToyPolicy(), given, micro_batch), whole, rtol=1e-10, atol=1e-13)


def test_the_log_has_the_rewards_of_the_rollout():
    """Of two optimiser steps the second sees other pictures: what is logged is what was sampled."""
    rows = []
    for last in (None, {"weight": 0.3}):
        own = FlowGRPO(FlowGRPO.Settings(inner_updates=2, last_step=last))
        rows.append(toy_trainer(own, ToyPolicy(), 3, 6).update(0).row())
    assert rows[0]["reward/toy"] == rows[1]["reward/toy"]
    assert rows[0]["reward/total"] == rows[1]["reward/total"]


def test_a_sample_without_a_score_has_no_pull():
    """The reward is NaN for the first sample, in the rollout and where its gradient is asked for."""
    given = toy_prompts(1, 6)
    first = int(given.seed[0])

    def broken(media, prompts):
        bad = torch.as_tensor(prompts.seed == first)
        return torch.where(bad, float("nan"), toy_reward(media, prompts))

    trainer = toy_trainer(rule(weight=1.0), ToyPolicy(), 1, 6)
    trainer.draw = lambda _: given
    trainer.scorer = trainer.sampling.scorer = trainer.backward.scorer = Scorer({"toy": Wrapped(broken)})
    row = trainer.update(0).row()
    assert np.isfinite(trainer.policy.delta.detach().numpy()).all() and row["reward/valid"] == pytest.approx(5 / 6)


def test_a_reward_without_gradient_is_refused():
    with pytest.raises(UserError) as caught:
        config.load("flow_grpo/shapes-sd3", ["rule.last_step={weight: 0.01}", "rewards={shapes_geneval: 1.0}"])
    assert any("needs a differentiable reward, shapes_geneval is not" in line for line in caught.value.problems)


@pytest.mark.parametrize("given", ["{weight: 0}", "{weight: -1}", "{wight: 1}", "{ceiling: .inf}", "3"])
def test_bad_values_are_refused(given):
    with pytest.raises(UserError) as caught:
        config.load("flow_grpo/shapes-sd3", [f"rule.last_step={given}", "rewards={shapes_pref: 1.0}"])
    assert any("rule.last_step" in line for line in caught.value.problems)
