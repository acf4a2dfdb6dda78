import numpy as np
import pytest
import torch

from diffalign.backends.toy import ToyPolicy
from diffalign.rules import DDPO
from diffalign.types import Credit, Plan, Prompts, Scores, Tree, Update
from tests.kit.helpers import gradient, toy_prompts, toy_trainer

S = DDPO.Settings


def scored(texts: list[str], values: list[float], valid: list[bool] | None = None) -> tuple[Tree, Scores, Prompts]:
    keys = np.arange(len(texts))
    total = np.array(values)
    good = np.ones(len(texts), bool) if valid is None else np.array(valid)
    prompts = Prompts(texts, keys, keys, keys, [{}] * len(texts))
    return Tree.grow(len(texts), (1, 1)), Scores({"r": total}, np.where(good, total, 0.0), good), prompts


def credits(rule: DDPO, *args, **kwargs) -> np.ndarray:
    tree, scores, prompts = scored(*args, **kwargs)
    found = rule.credit(tree, scores, prompts).edges
    again = rule.credit(
        tree, scores, prompts
    ).edges  # it changes nothing: what an update learnt is kept once the update is done
    assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))
    rule.after_update(Update(judged=(prompts.select(tree.leaf_root), scores)))
    assert len(found) == 2
    np.testing.assert_array_equal(found[0], found[1])
    return found[0]


def test_few_rewards_are_compared_with_the_batch_many_with_the_prompts_own():
    rule = DDPO(S(history=4, history_least=3))
    first = [1.0, 2.0, 5.0, 8.0]
    found = credits(rule, ["a", "a", "b", "b"], first)
    np.testing.assert_allclose(found, (np.array(first) - 4) / np.std(first), rtol=1e-5)
    second = [3.0, 6.0]
    found = credits(rule, ["a", "b"], second)
    a, b = np.array([1, 2, 3.0]), np.array([5, 8, 6.0])  # these included
    np.testing.assert_allclose(found, [(3 - a.mean()) / a.std(), (6 - b.mean()) / b.std()], rtol=1e-5)


def test_the_history_forgets_the_oldest():
    rule = DDPO(S(history=3, history_least=3))
    for value in (100.0, 1.0, 2.0):
        credits(rule, ["a"], [value])
    found = credits(rule, ["a"], [6.0])
    past = np.array([1.0, 2.0, 6.0])
    np.testing.assert_allclose(found, [(6 - 3) / past.std()], rtol=1e-5)
    assert rule.rewards == {"total": {"a": [1.0, 2.0, 6.0]}}


def test_invalid_scores_get_no_credit_and_are_not_remembered():
    rule = DDPO(S(history=4, history_least=2))
    found = credits(rule, ["a", "a", "a"], [1.0, 3.0, 50.0], [True, True, False])
    assert found[2] == 0
    assert rule.rewards == {"total": {"a": [1.0, 3.0]}}
    np.testing.assert_allclose(found[:2], [-1, 1], rtol=1e-5)


def test_equal_rewards_give_exactly_nothing():
    assert (credits(DDPO(S(history_least=2)), ["a"] * 24, [0.1] * 24) == 0).all()


def test_advantages_are_clipped():
    found = credits(DDPO(S(advantage_limit=2.0)), ["a"] * 50, [0.0] * 49 + [1.0])
    assert found[-1] == 2.0


def test_state_is_plain_data_and_comes_back():
    import json

    rule = DDPO(S(history_least=2))
    credits(rule, ["a", "b"], [1.0, 2.0])
    again = DDPO(S(history_least=2))
    again.load_state_dict(json.loads(json.dumps(rule.state_dict())))
    np.testing.assert_array_equal(credits(rule, ["a"], [5.0]), credits(again, ["a"], [5.0]))


@pytest.mark.parametrize("process", ["flow_sde", "ddim"])
@pytest.mark.parametrize("estimator", ["score", "importance"])
def test_invariant_11_gradient_is_minus_advantage_times_score(process, estimator):
    """Against the density written out with torch.distributions, on both kinds of sampler; the forms agree on policy."""
    policy, rule, given = ToyPolicy(process=process), DDPO(S(estimator=estimator)), toy_prompts(2, 8)
    found = gradient(rule, policy, given)
    rule = DDPO()
    plan = rule.plan(policy.schedule, 0, np.random.default_rng(0))
    part = policy.rollout(given, plan)
    from diffalign.training.scoring import Clock

    scores = toy_trainer(rule, policy).sampling.score(part, Clock(torch.device("cpu")))
    advantage = torch.from_numpy((scores.total - scores.total.mean()) / scores.total.std())
    delta = torch.zeros_like(policy.base).requires_grad_()
    total = 0.0
    for k in range(3):
        time = torch.full((len(part.x[k]), 1), float(policy.schedule.sigma[k]), dtype=torch.float64)
        output = torch.cat([part.x[k], time, torch.ones_like(time)], 1) @ (policy.base + delta).T
        mean = float(policy.noisy.x[k]) * part.x[k] + float(policy.noisy.prediction[k]) * output
        log_prob = torch.distributions.Normal(mean, part.std[k]).log_prob(part.x[k + 1]).mean(1)
        total = total - (advantage * log_prob).mean() / 3
    total.backward()
    np.testing.assert_allclose(found, delta.grad.numpy(), rtol=1e-10)


def test_first_pass_gap_is_zero_in_both_forms():
    for estimator in ("score", "importance"):
        policy, rule, given = ToyPolicy(process="ddim"), DDPO(S(estimator=estimator)), toy_prompts(1, 8)
        plan = rule.plan(policy.schedule, 0, np.random.default_rng(0))
        part = policy.rollout(given, plan)
        credit = Credit([np.ones(8)] * 4)
        for term in plan.updates[0]:
            assert rule.loss(term, policy, part, credit, lambda media: media.pixels).gap.item() == 0.0


def test_one_sample_a_prompt_is_enough():
    """Statistics over time replace the group: rewards rise with group_size 1."""
    from tests.kit.helpers import toy_reward

    policy, rule = ToyPolicy(process="ddim"), DDPO()
    trainer = toy_trainer(rule, policy, groups=32, group_size=1, lr=0.03)
    given = toy_prompts(1, 500, seed=9)

    def mean() -> float:
        part = policy.rollout(given, Plan.deterministic(4))
        return float(toy_reward(policy.decode(part, part.x[-1]), given).mean())

    before = mean()
    for index in range(30):
        trainer.update(index)
    assert mean() > before + 0.05


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"history": 8, "history_least": 16}, "rule.history_least: got 16"),
        ({"estimator": "score", "inner_updates": 2}, "rule.inner_updates: got 2"),
        ({"window": (3, 2)}, "rule.window: got [3, 2]"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, expected):
    assert any(expected in line for line in S(**settings).problems(10))
