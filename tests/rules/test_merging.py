"""Several rewards in every rule that learns from scores: normalised each by itself, and gates."""

import numpy as np
import pytest

from diffalign import config
from diffalign.errors import UserError
from diffalign.rules import RULES, shares
from diffalign.rules._merging import MergeSettings
from diffalign.types import Prompts, Scores, Tree

LEARN = [name for name, rule in RULES.items() if issubclass(rule.Settings, MergeSettings)]
BIG, SMALL = [0, 10, 20, 30, 5, 5, 6, 6], [0.3, 0.2, 0.1, 0.0, 0.1, 0.2, 0.1, 0.2]


def judged(weights, valid=None, **columns):
    by_name = {name: np.asarray(values, float) for name, values in columns.items()}
    total = sum(weights[name] * values for name, values in by_name.items())
    return Scores(by_name, total, np.ones(len(total), bool) if valid is None else np.asarray(valid), weights)


def credit(name, scores, **settings):
    """What each level's edges get, two prompts of four samples; of branch_grpo two roots a prompt with two children each."""
    more = {"branch_grpo": {"splits": [0]}, "ddpo": {"history_least": 4}}.get(name, {"scale": "group"})
    rule = RULES[name](RULES[name].Settings(**more, **settings))
    roots = 4 if name == "branch_grpo" else 8
    group = np.repeat([0, 1], roots // 2)
    keys = np.arange(roots)
    prompts = Prompts([f"p{g}" for g in group], group, keys, keys, [{}] * roots)
    return rule.credit(Tree.grow(roots, (2 if roots == 4 else 1, 1, 1)), scores, prompts).edges


def test_these_rules_learn_from_scores():
    assert set(LEARN) == {"flow_grpo", "grpo_guard", "branch_grpo", "ddpo", "awm", "nft"}


@pytest.mark.parametrize("name", LEARN)
def test_each_reward_can_be_normalised_by_itself(name):
    weights = {"big": 1.0, "small": 2.0}
    found = credit(name, judged(weights, big=BIG, small=SMALL), combine="normalised")
    alone = {n: credit(name, judged({n: 1.0}, **{n: v})) for n, v in (("big", BIG), ("small", SMALL))}
    for level, edges in enumerate(found):
        np.testing.assert_allclose(edges, alone["big"][level] + 2 * alone["small"][level], atol=1e-12)
    summed = credit(name, judged(weights, big=BIG, small=SMALL))[-1]
    assert np.corrcoef(summed[:4], alone["big"][-1][:4])[0, 1] > 0.999  # summed, the big one decides alone
    assert np.corrcoef(found[-1][:4], alone["big"][-1][:4])[0, 1] < 0.5


@pytest.mark.parametrize("name", LEARN)
def test_a_gate_puts_what_falls_short_last(name):
    weights = {"a": 1.0, "b": 0.0}
    scores = judged(weights, a=[1, 2, 3, 4, 1, 2, 3, 4], b=[1, 1, 1, 0, 1, 1, 1, 1])
    found = credit(name, scores, gate={"b": 0.5})[-1]
    assert found[3] == found[:4].min()  # the best by a, but below the gate
    assert credit(name, scores)[-1][3] == credit(name, scores)[-1][:4].max()
    if name != "ddpo":  # with few rewards of a prompt it compares with the batch
        np.testing.assert_allclose(found[4:], credit(name, scores)[-1][4:])
    with pytest.raises(UserError, match="rule.gate: got 'c', allowed are this run's rewards: a, b"):
        credit(name, scores, gate={"c": 0.5})


@pytest.mark.parametrize("name", LEARN)
def test_a_sample_without_a_score_gets_nothing_and_changes_nothing(name):
    valid, weights = [True] * 7 + [False], {"a": 1.0, "b": 1.0}
    values = [{"a": [*BIG[:7], end], "b": [*SMALL[:7], end]} for end in (0.0, np.nan)]
    found = [credit(name, judged(weights, valid, **v), combine="normalised")[-1] for v in values]
    np.testing.assert_array_equal(*found)
    assert found[0][7] == 0


def test_a_gate_on_a_reward_the_run_lacks_is_told_before_anything_loads():
    with pytest.raises(UserError, match=r"rule.gate: got 'nothing', allowed are rewards of this run: shapes_gen"):
        config.load("flow_grpo/shapes-sd3", ["rule.gate={nothing: 1}"])


# -- gdpo


def by_hand(columns, weights, valid, limit=5.0):
    """GDPO on two prompts of four samples: each reward standardised within its prompt, weighed, added up, standardised over all."""
    total = np.zeros(8)
    for name, values in columns.items():
        for rows in (slice(0, 4), slice(4, 8)):
            own = np.asarray(values, float)[rows][valid[rows]]
            total[rows][valid[rows]] += weights[name] * ((own - own.mean()) / own.std() if np.ptp(own) else 0 * own)
    found = (total - total[valid].mean()) / total[valid].std()
    return np.where(valid, np.clip(found, -limit, limit), 0)


GROUPED = [name for name in LEARN if name not in ("ddpo", "branch_grpo")]  # that compare the samples of a prompt


@pytest.mark.parametrize("name", GROUPED)
def test_gdpo_standardises_the_sum_over_the_update(name):
    weights, valid = {"big": 1.0, "small": 2.0}, np.arange(8) != 6
    found = credit(name, judged(weights, valid, big=BIG, small=SMALL), combine="gdpo")[-1]
    scale = 5.0 if name in ("awm", "nft") else 1.0  # these divide by the limit
    np.testing.assert_allclose(found * scale, by_hand({"big": BIG, "small": SMALL}, weights, valid), atol=1e-12)


@pytest.mark.parametrize("name", LEARN)
def test_gdpo_does_not_see_scales_and_a_constant_reward_changes_nothing(name):
    weights = {"big": 1.0, "small": 2.0}
    found = credit(name, judged(weights, big=BIG, small=SMALL), combine="gdpo")
    moved = credit(name, judged(weights, big=np.array(BIG) * 1000 + 7, small=SMALL), combine="gdpo")
    third = {**weights, "third": 5.0}
    constant = credit(name, judged(third, big=BIG, small=SMALL, third=[3] * 8), combine="gdpo")
    for level, edges in enumerate(found):
        np.testing.assert_allclose(moved[level], edges, atol=1e-9)  # roundings of 1000 r + 7
        np.testing.assert_array_equal(constant[level], edges)
    assert np.isfinite(found[-1]).all()
    assert np.abs(found[-1]).max() > 0.1


@pytest.mark.parametrize("name", LEARN)
def test_under_gdpo_a_prompt_without_spread_gets_exactly_nothing(name):
    # values whose standardised sum is no exact 0: a mean that is taken off would show
    flat = {"a": [0.3, 1.1, 2.7, 0.17, 0.1, 0.1, 0.1, 0.1], "b": [0.1, 0.2, 0.7, 0.9, 0.7, 0.7, 0.7, 0.7]}
    found = credit(name, judged({"a": 1.0, "b": 1.0}, **flat), combine="gdpo")[-1]
    if name != "ddpo":  # with few rewards of a prompt it compares with the batch
        assert (found[4:] == 0).all()
    assert (credit(name, judged({"a": 1.0, "b": 1.0}, a=[1] * 8, b=[2] * 8), combine="gdpo")[-1] == 0).all()


def test_gdpo_on_other_scales_is_refused():
    given = ["rule.combine=gdpo", "rule.scale=batch"]
    with pytest.raises(
        UserError, match=r"rule.scale: got batch, gdpo normalises each reward within its prompt; allowed is group"
    ):
        config.load("flow_grpo/shapes-sd3", given)
    with pytest.raises(UserError, match=r"rule.unit: got auto, has no effect without rule.combine: sum"):
        config.load("flow_grpo/shapes-sd3", ["rule.combine=normalised", "rule.unit=auto"])


# -- shares


def test_shares_are_those_of_the_variance_within_prompts():
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(400), 4)
    a, b = (
        rng.normal(size=1600) * 3 + group,
        rng.normal(size=1600),
    )  # between prompts there is spread that does not count
    settings = RULES["flow_grpo"].Settings()
    found = shares(judged({"a": 1.0, "b": 1.0}, a=a, b=b), group, settings)
    assert sum(found.values()) == pytest.approx(1)
    assert found["a"] == pytest.approx(0.9, abs=0.02)  # 9 of 10, with 1,200 degrees of freedom
    equal = shares(judged({"a": 1.0, "b": 1.0}, a=a, b=b), group, settings.model_copy(update={"combine": "gdpo"}))
    assert equal["a"] == pytest.approx(0.5, abs=0.02)
    against = shares(judged({"a": 1.0, "b": -1.0}, a=a, b=a / 2), group, settings)
    assert against == pytest.approx({"a": 2.0, "b": -1.0})
    assert shares(judged({"a": 1.0}, a=a), group, settings) == {}
    assert shares(judged({"a": 1.0, "b": 1.0}, a=[1] * 8, b=[2] * 8), np.repeat([0, 1], 4), settings) == {}


@pytest.mark.parametrize("combine", ["sum", "normalised"])
@pytest.mark.parametrize("name", LEARN)
def test_R12_a_soft_limit_bends_every_rules_advantages(name, combine):
    scores = judged({"big": 1.0, "small": 2.0}, big=BIG, small=SMALL)
    plain, soft = (credit(name, scores, combine=combine, **more) for more in ({}, {"soft_limit": 0.8}))
    unit = 5.0 if name in ("awm", "nft") else 1.0  # their credit is over the limit
    assert np.abs(plain[-1]).max() * unit > 0.8
    for one, other in zip(plain, soft, strict=True):
        np.testing.assert_allclose(other, 0.8 * np.tanh(one * unit / 0.8) / unit, rtol=1e-12, atol=1e-15)
        assert np.abs(other).max() * unit <= 0.8
