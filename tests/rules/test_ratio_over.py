"""`ratio_over: sample` of awm (V-GRPO): one ratio for all draws of a sample in an optimiser step."""

import numpy as np
import pytest
import torch

from diffalign.backends.toy import ToyPolicy
from diffalign.rules import AWM
from diffalign.rules._forward import noised
from diffalign.training.scoring import Clock
from tests.kit.helpers import shares_of, toy_trainer

GIVEN = {"weight": "adaptive", "spread": "strata", "times": 2, "inner_updates": 2, "anchor": 0.0, "clip": 0.02}


def second_pass(micro_batch: int, **given):
    """A rule whose policy has moved since its rollout of 16 samples, the terms, their credit, and the gradient of the next step."""
    rule, policy = AWM(AWM.Settings(**{**GIVEN, **given})), ToyPolicy()
    trainer = toy_trainer(rule, policy, 2, 8, micro_batch=micro_batch)
    sampled = trainer._sample(0, Clock(torch.device("cpu")))
    with torch.no_grad():
        policy.delta.add_(0.1 * torch.randn(policy.delta.shape, generator=torch.Generator().manual_seed(3)))
    terms = sampled.rollout.plan.updates[1]
    shares = shares_of(trainer, sampled, 1)
    trainer._gradient(shares, sampled, 0, 1)
    return rule, policy, sampled, terms, shares[0].credit, policy.delta.grad.numpy().copy()


def written_out(rule, policy, sampled, terms, worth):
    """Gradient of `worth` (log r, A), log r the mean over draws with everything attached; over all samples in one pass."""
    part, log_ratio = sampled.rollout, 0.0
    for term in terms:
        at = noised(term, policy, part)
        now = rule._log_p(at, at.predicted(policy))
        with policy.shadow("old"):
            old = rule._log_p(at, at.predicted(policy))
        log_ratio = log_ratio + term.weight * (now - old)
    policy.delta.grad = None
    worth(log_ratio, torch.from_numpy(sampled.credit.edges[-1])).mean().backward()
    return policy.delta.grad.numpy().copy(), log_ratio.detach().numpy()


def surrogate(log_ratio, advantage):
    ratio = log_ratio.exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.98, 1.02))


def proximal(log_ratio, advantage):
    fixed = log_ratio.detach()
    return -fixed.exp() * (advantage - fixed) * log_ratio


@pytest.mark.parametrize("micro_batch", [16, 5, 2])
@pytest.mark.parametrize(("row", "worth"), [("clipped", surrogate), ("proximal", proximal)])
def test_R11_a_sample_has_one_ratio_whatever_the_micro_batch(row, worth, micro_batch):
    given = {"row": row, **({} if row == "clipped" else {"clip": 1.0})}
    rule, policy, sampled, terms, credit, found = second_pass(micro_batch, ratio_over="sample", **given)
    expected, log_ratio = written_out(rule, policy, sampled, terms, worth)
    assert len({term.weight for term in terms}) == 2  # of 3 levels: each draw by its share
    for own in credit:
        np.testing.assert_allclose(own.rows["log_ratio"], log_ratio, rtol=1e-10, atol=1e-14)
    if row == "clipped":
        assert 0 < (abs(np.exp(log_ratio) - 1) > 0.02).sum() < 16
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-13)
    # each draw with its own exponential is another gradient
    *_, apart = second_pass(micro_batch, ratio_over="draw", **given)
    assert abs(apart - expected).max() > 1e-3 * abs(expected).max()


def test_on_a_first_pass_both_are_one_gradient():
    one, other = AWM(AWM.Settings(**GIVEN)), AWM(AWM.Settings(**GIVEN, ratio_over="sample"))
    found = []
    for rule in (one, other):
        policy = ToyPolicy()
        trainer = toy_trainer(rule, policy, 2, 8, micro_batch=4)
        trainer.gradient(0)
        found.append(policy.delta.grad.numpy().copy())
    assert abs(found[0]).max() > 0
    np.testing.assert_array_equal(found[1], found[0])


def test_it_goes_with_implicit_rewards():
    """Each term has its own weight in place of the advantage, and the one ratio."""
    *_, credit, _ = second_pass(8, ratio_over="sample", implicit="residual")
    assert all(own.rows.keys() >= {"weight", "implicit", "log_ratio"} for own in credit)
    np.testing.assert_array_equal(credit[0].rows["log_ratio"], credit[1].rows["log_ratio"])
    assert (credit[0].rows["weight"] != credit[1].rows["weight"]).any()


def test_R25_it_is_refused_where_every_ratio_is_one():
    assert AWM.Settings(ratio_over="sample").problems(10) == [
        "rule.ratio_over: got sample, has no effect without rule.inner_updates above 1 or rule.old_decay: the old policy is the trained one"
    ]
    assert not AWM.Settings(ratio_over="sample", old_decay=0.5).problems(10)
