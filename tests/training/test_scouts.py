"""Scouts: seeds are tried in few steps, the best and the worst of a prompt are sampled anew, and nothing is learnt from the first samples.

Numbers are those of the method's list of properties; 15, that processes keep the same seeds, is in tests/runtime/test_distributed.py.
"""

import numpy as np
import pytest
import torch

from diffalign import config
from diffalign.backends.toy import ToyPolicy, toy_reward
from diffalign.errors import UserError
from diffalign.planning import cost
from diffalign.rewards.base import Wrapped
from diffalign.rules import AWM, NFT, RULES, TruncatedBP
from diffalign.runs.budget import Spent
from diffalign.runtime import keys
from diffalign.training.scoring import Clock
from diffalign.training.selection import Scouts, extremes, rank_correlation, resized, scout_plan
from diffalign.types import Media, Plan, Tree
from tests.kit.helpers import toy_prompts, toy_trainer

CPU = torch.device("cpu")


def scouting(rule, pool, steps=2, groups=3, size=4, reward=toy_reward, rewards=None, **kwargs):
    trainer = toy_trainer(rule, ToyPolicy(steps=4), groups, size, **kwargs)
    trainer.scorer.rewards["toy"] = Wrapped(reward)
    trainer.selector = Scouts(pool, steps, rewards)
    return trainer


def sampled(trainer):
    return trainer._sample(0, Clock(CPU))


@pytest.mark.parametrize("make", [AWM, NFT])
def test_10_a_kept_sample_is_an_ordinary_rollout_of_its_seed(make):
    found = sampled(scouting(make(), 8))
    pool = resized(toy_prompts(3, 4), dict.fromkeys(range(3), 8))
    rows = [pool.seed.tolist().index(seed) for seed in found.prompts.seed]
    assert len(set(rows)) == 12
    assert found.prompts.group.tolist() == pool.group[rows].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    plain = ToyPolicy(steps=4).rollout(
        pool.select(rows), Plan.deterministic(4)
    )  # in batches of the same size: the same bits
    assert torch.equal(found.rollout.x[-1], plain.x[-1])
    # Those that were drawn first are in the pool, and further ones have seeds of their own.
    assert pool.seed.reshape(3, 8)[:, :4].flatten().tolist() == toy_prompts(3, 4).seed.tolist()
    assert len(set(pool.seed.tolist())) == 24


@pytest.mark.parametrize("make", [AWM, NFT, TruncatedBP])
def test_11_a_pool_of_which_all_are_kept_changes_no_bit(make):
    plain, scouted = toy_trainer(make(), ToyPolicy(), 3, 4), scouting(make(), 4)
    for index in range(3):
        rows = [trainer.update(index).row() for trainer in (plain, scouted)]
        own = [{k: v for k, v in row.items() if not k.startswith(("scouts/", "seconds/", "nfe"))} for row in rows]
        assert own[0] == own[1]
        assert rows[1]["nfe"] == rows[0]["nfe"] + 12 * 2
    assert torch.equal(plain.policy.delta, scouted.policy.delta)
    assert plain.policy.delta.abs().max() > 0


def test_12_credit_follows_the_second_scores_alone():
    """A reward that says the opposite of the finished pictures: it knows scouts by their number."""

    def fickle(media, prompts):
        return toy_reward(media, prompts) * (-1 if len(prompts) == 12 else 1)

    rule = AWM()
    found = sampled(scouting(rule, 8, reward=fickle, micro_batch=24))
    media = ToyPolicy().pixels(found.prompts, found.rollout.x[-1])
    second = -toy_reward(media, found.prompts).numpy()
    prompts, scores = found.update.judged
    np.testing.assert_array_equal(scores.total, second)
    tree = Tree.grow(12, found.rollout.plan.branch)
    np.testing.assert_array_equal(found.credit.edges[-1], rule.credit(tree, scores, prompts).edges[-1])
    for group in range(3):  # better than expected is what the second score says so
        rows = prompts.group == group
        expected = second[rows] - second[rows].mean()
        assert rank_correlation(found.credit.edges[-1][rows], expected) == pytest.approx(1)


def test_13_equal_scouts_are_kept_by_lot():
    valid, equal = np.ones(16, bool), np.zeros(16)
    kept = [extremes(equal, valid, 4, np.random.default_rng(seed)).tolist() for seed in range(400)]
    counts = np.bincount(np.concatenate(kept), minlength=16)
    assert (np.abs(counts - 100) < 5 * (400 * 0.25 * 0.75) ** 0.5).all()  # five standard deviations of a fair lot
    assert kept[3] == extremes(equal, valid, 4, np.random.default_rng(3)).tolist()
    flat = lambda media, prompts: torch.zeros(len(prompts))  # noqa: E731
    first, again = (sampled(scouting(AWM(), 8, reward=flat)).prompts.seed.tolist() for _ in range(2))
    pool = resized(toy_prompts(3, 4), dict.fromkeys(range(3), 8))
    assert first == again
    places = np.array([pool.seed.tolist().index(seed) % 8 for seed in first]).reshape(3, 4)
    assert not (places == np.arange(4)).all(1).any()
    assert len({tuple(row) for row in places.tolist()}) > 1  # each prompt has a lot of its own


def test_the_best_and_the_worst_are_kept():
    total = np.array([3.0, 9.0, 1.0, 5.0, 7.0, 2.0, 8.0, 4.0])
    every, rng = np.ones(8, bool), np.random.default_rng(0)
    assert extremes(total, every, 4, rng).tolist() == [1, 2, 5, 6]
    assert extremes(total, every, 3, rng).tolist() == [1, 2, 6]  # odd: one more of the best
    assert extremes(total, every, 8, rng).tolist() == list(range(8))


def test_14_scouts_without_a_score_are_kept_only_where_others_are_too_few():
    total, valid = np.arange(8.0), np.ones(8, bool)
    total[[0, 7]], valid[[0, 7]] = 0.0, False
    for seed in range(20):
        rng = np.random.default_rng(seed)
        assert extremes(total, valid, 4, rng).tolist() == [1, 2, 5, 6]
    valid[[2, 3, 4]] = False
    kept = [set(extremes(total, valid, 4, np.random.default_rng(seed)).tolist()) for seed in range(20)]
    assert all({1, 5, 6} < each for each in kept)
    assert len({frozenset(each) for each in kept}) > 1

    def sometimes(media, prompts):  # every other scout has none; of twelve all have
        value = toy_reward(media, prompts)
        return value if len(prompts) == 12 else torch.where(torch.arange(len(value)) % 2 == 0, value, torch.nan)

    row = scouting(NFT(), 8, reward=sometimes, micro_batch=24).update(0).row()
    assert row[keys.SCOUTS_INVALID] == 12
    assert row[keys.VALID] == 1


@pytest.mark.parametrize("make", [AWM, NFT])
def test_16_how_far_scouts_agree_is_logged_and_with_all_steps_they_do(make):
    whole = scouting(make(), 8, steps=4).update(0).row()
    assert whole[keys.SCOUTS_RANK] == 1
    assert whole[keys.SCOUTS_KEPT] == whole[keys.TOTAL]
    trainer = scouting(make(), 8, steps=1, size=6)
    few = trainer.update(0).row()
    assert few[keys.SCOUTS_RANK] < 1
    # The same by hand: the correlation of ranks within a prompt, then the mean.
    policy, pool = ToyPolicy(steps=4), resized(toy_prompts(3, 6), dict.fromkeys(range(3), 8))
    scores = [
        toy_reward(policy.pixels(pool, policy.rollout(pool, plan).x[-1]), pool).numpy()
        for plan in (scout_plan(Plan.deterministic(4), 1), Plan.deterministic(4))
    ]
    by_hand = []
    for rows in np.arange(24).reshape(3, 8):
        kept = rows[np.argsort(scores[0][rows])[[0, 1, 2, 5, 6, 7]]]
        ranks = [np.argsort(np.argsort(score[kept])) for score in scores]
        by_hand.append(np.corrcoef(*ranks)[0, 1])
    assert few[keys.SCOUTS_RANK] == pytest.approx(np.mean(by_hand))
    assert few[keys.SCOUTED] == pytest.approx(scores[0].mean())


def test_ranks_of_what_does_not_differ_are_not_known():
    assert rank_correlation(np.array([1.0, 2.0, np.nan]), np.array([4.0, 3.0, 9.0])) == pytest.approx(-1)
    assert rank_correlation(np.ones(4), np.arange(4.0)) is None
    assert rank_correlation(np.array([1.0, np.nan]), np.array([1.0, 2.0])) is None


def test_the_old_policy_that_samples_scouts_too():
    """NFT samples by a slow copy: scouts by another one would be of other pictures."""
    trainer = scouting(NFT(NFT.Settings(old_decay=1.0)), 8, steps=4)
    with torch.no_grad():
        trainer.policy.delta += 0.5
    row = trainer.update(0).row()
    assert row[keys.SCOUTS_KEPT] == row[keys.TOTAL]


def test_some_rewards_score_scouts_with_the_weights_they_have():
    seen = []

    def other(media: Media, prompts):
        seen.append(len(prompts))
        return media.pixels.flatten(1).sum(1)

    trainer = scouting(AWM(), 8, rewards=["toy"], micro_batch=24)
    trainer.scorer.rewards["other"], trainer.scorer.weights["other"] = Wrapped(other), 2.0
    update = trainer.update(0)
    assert seen == [12]
    assert update.scouted == 24
    assert Spent.on(update).reward_calls == 24 + 12
    assert Spent.on(update).rows == update.metrics["nfe"] + 2 * update.metrics["nfe_backward"]


def test_plan_counts_scouts():
    plain, scouted = (
        cost.count(
            config.load(
                "nft/shapes-sd3", ["prompts.groups=2", "prompts.group_size=4", "optimizer.micro_batch=8", *more]
            )
        )
        for more in ([], ["prompts.scouts={pool: 12, steps: 3}"])
    )
    assert scouted.rows_forward - plain.rows_forward == 2 * 12 * 3
    assert scouted.decode_flops == plain.decode_flops * (8 + 24) / 8
    assert "samples     8 an update, chosen by 24 scouts that are scored too" in scouted.lines(None)
    assert "samples     8 an update" in plain.lines(None)


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("distil", ["prompts.scouts={pool: 32, steps: 2}"], "prompts.scouts: got distil, which asks no rewards"),
        ("flow_grpo", ["prompts.scouts={pool: 32}"], "prompts.scouts: got flow_grpo, whose samples are not"),
        ("awm", ["prompts.scouts={pool: 32}", "rule.noise=true"], "prompts.scouts: got awm with rule.noise, whose"),
        (
            "nft",
            ["prompts.scouts={pool: 40}"],
            "prompts.scouts.pool: got 40, allowed are multiples of prompts.group_size (16)",
        ),
        ("nft", ["prompts.scouts={pool: 8}"], "prompts.scouts.pool: got 8, allowed are multiples"),
        (
            "nft",
            ["prompts.scouts={pool: 32, steps: 11}"],
            "prompts.scouts.steps: got 11, allowed is up to sampler.steps (10)",
        ),
        (
            "nft",
            ["prompts.scouts={pool: 32, rewards: [a]}"],
            "prompts.scouts.rewards: got 'a', allowed are rewards of this run",
        ),
        (
            "nft",
            ["prompts.scouts={pool: 32}", "budget.reward_calls=100"],
            "budget.reward_calls: got 100, an update scores 192",
        ),
    ],
)
def test_what_cannot_go_with_scouts_is_refused(name, given, said):
    with pytest.raises(UserError) as caught:
        config.load(f"{name}/shapes-sd3", given)
    assert [line for line in caught.value.problems if line.startswith(said)]


def test_every_rule_takes_scouts_or_is_refused_by_name():
    taken = [name for name, rule in RULES.items() if not rule().needs.stochastic_sampler and rule().needs.rewards]
    assert taken == ["truncated_bp", "awm", "nft"]
