"""Samples without a score in rules that go through the reward's gradient: no weight, counted, and a limit."""

import numpy as np
import pytest
import torch

from diffalign.backends.toy import ToyPolicy
from diffalign.errors import Unscored
from diffalign.rewards.scorer import Scorer
from diffalign.rules import RLR, TruncatedBP
from diffalign.types import Credit, Media
from tests.kit.helpers import toy_prompts, toy_reward, toy_trainer

MISSING = 2  # the sample without a score


def holed(media: Media, prompts) -> torch.Tensor:
    """The toy reward, with a backward pass that is not a number for what has no score, as a logarithm of 0 has."""
    value = toy_reward(media, prompts)
    lost = torch.tensor([int(seed) == int(toy_prompts(3, 4).seed[MISSING]) for seed in prompts.seed])
    out = value.clone()
    out[lost] = (value[lost] * 0).log() * 0
    return out


def trained(rule, reward, micro_batch: int, **settings):
    policy = ToyPolicy()
    trainer = toy_trainer(rule, policy, 3, 4, micro_batch=micro_batch)
    trainer.scorer = trainer.backward.scorer = trainer.sampling.scorer = Scorer({"toy": reward})
    for name, value in settings.items():
        setattr(trainer, name, value)
    return policy, trainer


@pytest.mark.parametrize("micro_batch", [12, 4, 1])
@pytest.mark.parametrize(
    "make",
    [lambda: TruncatedBP(TruncatedBP.Settings(depth="all")), lambda: RLR(RLR.Settings(cover="zo", pairs=2))],
    ids=["truncated_bp", "rlr_zo"],
)
def test_one_missing_score_takes_its_sample_out_and_nothing_else(make, micro_batch):
    """As if that sample's reward were a constant: it learns nothing, the others what they would have."""

    def constant(media, prompts):
        value = toy_reward(media, prompts)
        lost = torch.tensor([int(seed) == int(toy_prompts(3, 4).seed[MISSING]) for seed in prompts.seed])
        return torch.where(lost, 0.0, value)

    found = []
    for reward in (holed, constant):
        policy, trainer = trained(make(), reward, micro_batch)
        trainer.rule.credit = lambda tree, scores, prompts: Credit([np.zeros(len(p)) for p in tree.parent])
        trainer.gradient(0)
        found.append(policy.delta.grad.clone())
    assert found[0].isfinite().all()
    assert found[0].abs().max() > 1e-6
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-15)


def test_it_is_counted_and_its_mean_is_that_of_the_others():
    policy, trainer = trained(TruncatedBP(), holed, 4)
    update = trainer.update(0)
    assert (update.scored, update.unscored, update.nonfinite) == (11, 1, 0)
    assert update.metrics["invalid/toy"] == 1
    assert np.isfinite(update.metrics["reward/toy"])
    assert policy.delta.abs().max() > 0


def test_too_many_stop_the_run_before_anything_is_learnt():
    policy, trainer = trained(TruncatedBP(), holed, 4, max_invalid=0.05)
    with pytest.raises(Unscored, match="update 1: samples without a score, toy: 1 of 12"):
        trainer.update(0)
    assert (policy.delta == 0).all()
    policy, trainer = trained(TruncatedBP(), holed, 4, max_invalid=0.1)
    trainer.update(0)
