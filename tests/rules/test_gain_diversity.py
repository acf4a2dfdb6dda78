"""`rule.diversity`: what a sample gains counts times how far it is from the nearest of its group."""

import numpy as np
import pytest
import torch

from diffalign import config as configs
from diffalign.errors import UserError
from diffalign.rules import AWM, DDPO, NFT, RULES, FlowGRPO, GRPOGuard
from diffalign.types import Media, Scores, Tree
from reward_models.diversity import NearestThumbnail
from tests.kit.helpers import toy_prompts

GROUP = np.repeat([0, 1], 4)
LEARN = [AWM, NFT, FlowGRPO, GRPOGuard, DDPO]


def credit(rule, factor, valid=None):
    """Of two groups of four, the second with an equal pair of winners."""
    reward = np.array([0.0, 1, 2, 9, 1, 5, 5, 0])
    known = np.ones(8, bool) if valid is None else valid
    by_name = {"r": reward, "apart": np.asarray(factor, float)}
    scores = Scores(by_name, reward, known, {"r": 1.0, "apart": 0.0})
    return rule.credit(Tree.grow(8, (1,) * 4), scores, toy_prompts(2, 4)).edges[-1]


@pytest.mark.parametrize("kind", LEARN)
def test_38_copies_gain_nothing_and_losses_stay(kind):
    plain = credit(kind(kind.Settings()), np.zeros(8))
    found = credit(kind(kind.Settings(diversity="apart")), np.zeros(8))
    assert (plain > 0).any() and np.isfinite(found).all()
    np.testing.assert_array_equal(found, np.minimum(plain, 0.0))


@pytest.mark.parametrize("kind", LEARN)
def test_gains_are_multiplied_and_a_sample_without_a_score_gains_nothing(kind):
    factor = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, np.nan, 0.8])
    valid = np.isfinite(factor)
    plain = credit(kind(kind.Settings()), factor, valid)
    found = credit(kind(kind.Settings(diversity="apart")), factor, valid)
    np.testing.assert_allclose(found, np.where(plain > 0, plain * np.nan_to_num(factor), plain), rtol=1e-12)
    assert found[6] == 0


def test_a_reward_below_0_would_turn_gains_round():
    with pytest.raises(UserError, match="rule.diversity: got apart, which gave -2.05 and would turn gains round"):
        credit(AWM(AWM.Settings(diversity="apart")), np.full(8, -2.05))


def novelty(pixels, groups=(4,)):
    reward = NearestThumbnail()
    reward.sizes = groups
    given = toy_prompts(len(pixels) // groups[0], groups[0])
    return np.asarray(reward(Media(pixels), given))


def test_novelty_is_the_distance_to_the_nearest_other_of_the_group():
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.uniform(size=(8, 1, 3, 16, 16)).round(2)).float()
    pixels[1], pixels[6] = pixels[0], pixels[2]  # a copy in its own group, and one of another group's
    found = novelty(pixels)
    assert found[0] == found[1] == 0
    quantised = (pixels.numpy() * 255).round() / 255
    flat = quantised[:, 0].transpose(0, 2, 3, 1).reshape(8, -1)
    flat = flat - flat.mean(1, keepdims=True)
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    for k in (2, 3, 4, 5, 6, 7):
        own = [j for j in range(8) if j // 4 == k // 4 and j != k]
        assert found[k] == pytest.approx(min(1 - unit[k] @ unit[j] for j in own), abs=1e-6)


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_pictures_of_one_colour_are_no_news_and_no_nan(level):
    assert (novelty(torch.full((4, 1, 3, 16, 16), level)) == 0).all()


BOTH = ["rewards={shapes_geneval_partial: 1.0, novelty: 0}", "rule.diversity=novelty"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([BOTH[1]], "rule.diversity: got 'novelty', allowed are this run's rewards of weight 0: there are none yet"),
        (["rewards={shapes_geneval_partial: 1.0, novelty: 1}", BOTH[1]], "rule.diversity: got 'novelty', allowed are"),
        ([*BOTH, "prompts.group_size=1"], "prompts.group_size: got 1, rule.diversity compares samples of a group"),
    ],
)
def test_what_is_refused(settings, said):
    with pytest.raises(UserError) as caught:
        configs.load("awm/shapes-sd3", settings)
    assert said in "\n".join(caught.value.problems)


def test_edges_of_branches_are_no_samples():
    with pytest.raises(UserError, match="rule.diversity: got novelty, gains here are edges'"):
        configs.load("branch_grpo/shapes-sd3", BOTH)


def test_it_is_a_key_of_every_rule_that_learns_from_scores():
    having = {name for name, rule in RULES.items() if "diversity" in rule.Settings.model_fields}
    assert having == {kind.name for kind in LEARN} | {"branch_grpo"}
    assert configs.load("awm/shapes-sd3", BOTH).rule["diversity"] == "novelty"
