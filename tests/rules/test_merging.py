"""Several rewards in every rule that learns from scores: normalised each by itself, and gates."""

import numpy as np
import pytest

from diffalign import config
from diffalign.errors import UserError
from diffalign.rules import RULES
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
