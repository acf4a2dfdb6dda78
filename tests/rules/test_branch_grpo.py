import numpy as np
import pytest
import torch

from diffalign.backends.toy import ToyPolicy
from diffalign.ops import advantages
from diffalign.rewards.base import Wrapped
from diffalign.rules import BranchGRPO, FlowGRPO
from diffalign.training.backward import Share
from diffalign.training.scoring import Clock
from diffalign.types import Scores, Tree
from tests.kit.helpers import gradient, toy_prompts, toy_trainer

S = BranchGRPO.Settings


def rolled(rule, policy: ToyPolicy, groups: int = 2, size: int = 1, update: int = 0):
    given = toy_prompts(groups, size)
    plan = rule.plan(policy.schedule, update, np.random.default_rng(0))
    part = policy.rollout(given, plan)
    scores = toy_trainer(rule, policy, groups, size).sampling.score(part, Clock(torch.device("cpu")))
    return plan, part, scores, given


@pytest.mark.parametrize(
    ("splits", "factor", "rows", "edges", "leaves"),
    [
        ((0, 3, 6, 9), 2, 203, 218, 16),
        ((0, 4, 8, 12), 2, 169, 184, 16),
        ((0, 5, 10, 15), 2, 135, 150, 16),
        ((0, 3, 6, 9), 3, 928, 1008, 81),
    ],
)
def test_T32_rows_of_sampling_and_training(splits, factor, rows, edges, leaves):
    """One network row per node, for all of its children together, forward and backward."""
    policy = ToyPolicy(steps=20)
    rule = BranchGRPO(S(splits=splits, factor=factor))
    trainer = toy_trainer(rule, policy, 1, 1, micro_batch=1)
    trainer.update(0)
    last = leaves  # the last step has no noise and is not trained
    assert policy.rows_forward == rows + rows - last
    assert policy.rows_backward == rows - last
    plan = rule.plan(policy.schedule, 0, np.random.default_rng(0))
    tree = Tree.grow(1, plan.branch)
    assert sum(len(parent) for parent in tree.parent) == edges
    assert len(tree.leaf_root) == leaves


def test_T33_without_children_it_is_flow_grpo():
    rule = BranchGRPO(S(factor=1, splits=[0], normalise="leaves"))
    expected = gradient(FlowGRPO(), ToyPolicy(), toy_prompts(2, 8))
    np.testing.assert_allclose(gradient(rule, ToyPolicy(), toy_prompts(2, 8)), expected, rtol=1e-9, atol=1e-14)


TWO_LEVELS = Tree.grow(1, (2, 2))
LEAVES = np.array([0.1, 0.4, 0.3, 0.9])


def test_T34_fusion_is_the_mean_of_the_leaves_or_follows_the_likelier_path():
    everything = np.ones(4, bool)
    values, valid = advantages.fuse(LEAVES, everything, TWO_LEVELS.parent)
    np.testing.assert_allclose(values[1], [0.25, 0.6])
    np.testing.assert_allclose(values[0], [0.425])
    for level, average in zip(values, advantages.average_to_parents(LEAVES, TWO_LEVELS.parent), strict=True):
        np.testing.assert_allclose(level, average)
    log_prob = [np.array([-1.0, -2.0]), np.array([-3.0, -1.0, -5.0, -1.0])]
    values, _ = advantages.fuse(LEAVES, everything, TWO_LEVELS.parent, log_prob, beta=1.0)
    paths = np.array([-4.0, -2.0, -7.0, -3.0])  # summed along each leaf's path
    weights = np.exp(paths) / np.exp(paths).sum()
    np.testing.assert_allclose(values[0], [weights @ LEAVES])
    w = np.exp([-3.0, -1.0])
    np.testing.assert_allclose(values[1][0], w @ LEAVES[:2] / w.sum())
    values, _ = advantages.fuse(LEAVES, everything, TWO_LEVELS.parent, log_prob, beta=1000.0)
    np.testing.assert_allclose(values[0], [0.4])


def test_fusion_leaves_out_what_has_no_score():
    valid = np.array([True, False, False, False])
    values, found = advantages.fuse(np.array([0.1, 0.0, 0.0, 0.0]), valid, TWO_LEVELS.parent)
    np.testing.assert_allclose(values[0], [0.1])
    assert found[1].tolist() == [True, False]


def test_T34_T35_an_edge_has_its_childs_advantage_at_its_depth():
    given = toy_prompts(1, 1)
    scores = Scores({}, LEAVES, np.ones(4, bool))
    credit = BranchGRPO(S(splits=[0, 1])).credit(TWO_LEVELS, scores, given).edges
    # population std of [.25, .6]; with the sample's it would be -+ 0.7071
    np.testing.assert_allclose(credit[0], [-1, 1], atol=1e-3)
    np.testing.assert_allclose(credit[1], (LEAVES - LEAVES.mean()) / LEAVES.std())
    assert all(abs(edges.sum()) < 1e-9 for edges in credit)
    by_leaves = BranchGRPO(S(splits=[0, 1], normalise="leaves")).credit(TWO_LEVELS, scores, given).edges
    np.testing.assert_allclose(by_leaves[0], [-0.175, 0.175] / LEAVES.std())
    np.testing.assert_allclose(by_leaves[1], credit[1])


def test_path_weights_reach_the_rule_from_the_rollout():
    rule, policy = BranchGRPO(S(splits=[0, 1], fusion=2.0)), ToyPolicy()
    trainer = toy_trainer(rule, policy, 2, 1)
    seen = []
    own = rule.credit
    rule.credit = lambda tree, scores, prompts: seen.append(scores) or own(tree, scores, prompts)
    sampled = trainer._sample(0, Clock(torch.device("cpu")))
    credit = sampled.credit.edges
    (scores,) = seen
    for step, edges in enumerate(scores.log_prob):
        stored = sampled.rollout.log_prob[step]
        expected = np.zeros(len(edges)) if stored is None else stored.numpy()
        np.testing.assert_array_equal(edges, expected)
    # By the leaves' spread: two nodes' own spread makes their advantages 1 and -1 whatever they are.
    weighed, plain = (
        BranchGRPO(S(splits=[0, 1], normalise="leaves", fusion=beta))
        .credit(sampled.rollout.tree, scores, sampled.rollout.prompts)
        .edges
        for beta in (2.0, 0.0)
    )
    assert np.abs(plain[0] - weighed[0]).max() > 1e-3
    np.testing.assert_array_equal(weighed[1], plain[1])
    assert len(credit) == len(plain)


@pytest.mark.parametrize("width", ["better_child", "extremes"])
def test_T36_width_pruning_takes_edges_after_the_last_split_and_changes_nothing_else(width):
    policy = ToyPolicy(steps=20)
    splits = [0, 3, 6, 9]
    _, part, scores, given = rolled(BranchGRPO(S(splits=splits)), policy)
    whole = BranchGRPO(S(splits=splits)).credit(part.tree, scores, given).edges
    pruned = BranchGRPO(S(splits=splits, width=width, extremes=4)).credit(part.tree, scores, given).edges
    for step, (a, b) in enumerate(zip(whole, pruned, strict=True)):
        kept = b != 0
        np.testing.assert_array_equal(a[kept], b[kept])
        assert kept.sum() == (len(a) / 2 if step > 9 else len(a))
    assert sum((edges != 0).sum() for edges in pruned) == 2 * 138
    best = [int(np.argmax(scores.total[:16])), 16 + int(np.argmax(scores.total[16:]))]
    assert (pruned[-1][best] != 0).all()
    if width == "better_child":
        pairs = scores.total.reshape(-1, 2)
        np.testing.assert_array_equal((pruned[-1] != 0).reshape(-1, 2).argmax(1), pairs.argmax(1))


def test_a_sibling_without_a_score_does_not_drop_one_that_has_it():
    """Leaves 0, none, 5, 6: the first is the worst and the only one of its pair, and stays."""
    scores = Scores({}, np.array([0.0, 0.0, 5.0, 6.0]), np.array([True, False, True, True]))
    rule = BranchGRPO(S(splits=[0, 1], width="better_child"))
    tree = Tree.grow(1, (2, 2, 1))
    last = rule.credit(tree, scores, toy_prompts(1, 1)).edges[-1]
    assert last[0] == pytest.approx((0 - 11 / 3) / np.std([0, 5, 6]))
    assert last[1] == 0
    assert last[2] == 0
    assert last[3] > 0


@pytest.mark.parametrize(("skipped", "edges"), [(4, 154), (5, 138)])
def test_T36_depth_pruning_leaves_out_steps_and_moves_later(skipped, edges):
    policy, rule = ToyPolicy(steps=20), BranchGRPO(S(splits=[0, 3, 6, 9], skip_depths=skipped))
    children = np.cumprod([2 if k in (0, 3, 6, 9) else 1 for k in range(20)])
    for update, first in ((0, 9), (29, 9), (30, 10), (90, 12), (10_000, 19 - skipped)):
        plan = rule.plan(policy.schedule, update, np.random.default_rng(0))
        learned = [term.start for term in plan.updates[0]]
        assert [k for k in range(19) if k not in learned] == list(range(first, first + skipped))
        assert sum(children[k] for k in learned) + 16 == edges  # and the 16 of the last step, which has no noise
        assert sum(term.weight for term in plan.updates[0]) == pytest.approx(1)
        assert all(plan.noise[:19])


def test_T37_one_forward_for_all_children_is_the_sum_over_edges():
    policy, rule = ToyPolicy(), BranchGRPO(S(splits=[0, 1]))
    plan, part, scores, given = rolled(rule, policy, 3)
    credit = rule.credit(part.tree, scores, given)
    trainer = toy_trainer(rule, policy, 3, 1)
    trainer.optimizer.zero_grad()
    trainer.backward.accumulate([Share(plan.updates[0], part, [credit] * len(plan.updates[0]))], first=True)
    delta = policy.delta.detach().clone().requires_grad_()
    total, edges = 0.0, 0
    for term in plan.updates[0]:
        k, parent = term.start, part.tree.parent[term.start]
        for child in range(len(parent)):
            x = part.x[k][parent[child]][None]
            time = torch.full((1, 1), float(policy.schedule.sigma[k]), dtype=x.dtype)
            v = torch.cat([x, time, torch.ones_like(time)], 1) @ (policy.base + delta).T
            mean = float(policy.noisy.x[k]) * x + float(policy.noisy.prediction[k]) * v
            log_prob = torch.distributions.Normal(mean, part.std[k]).log_prob(part.x[k + 1][child]).mean()
            total, edges = total - credit.edges[k][child] * log_prob, edges + 1
    (total / edges).backward()
    torch.testing.assert_close(policy.delta.grad, delta.grad, rtol=1e-9, atol=1e-12)


def test_depths_can_weigh_alike():
    plan = BranchGRPO(S(splits=[0, 1], average="depths")).plan(ToyPolicy().schedule, 0, np.random.default_rng(0))
    assert [term.weight for term in plan.updates[0]] == pytest.approx([1 / 3] * 3)
    plan = BranchGRPO(S(splits=[0, 1])).plan(ToyPolicy().schedule, 0, np.random.default_rng(0))
    assert [term.weight for term in plan.updates[0]] == pytest.approx([2 / 10, 4 / 10, 4 / 10])


def test_T39_the_mix_variant_trains_noisy_edges_only():
    policy, rule = (
        ToyPolicy(steps=10),
        BranchGRPO(S(splits=[0, 2], window=(4, 8), window_steps=2, window_move="sliding", window_every=1)),
    )
    for update, expected in ((0, [0, 2, 4, 5]), (1, [0, 2, 5, 6]), (3, [0, 2, 4, 5])):
        plan = rule.plan(policy.schedule, update, np.random.default_rng(0))
        assert [k for k, on in enumerate(plan.noise) if on] == expected
        assert [term.start for term in plan.updates[0]] == expected
    part = policy.rollout(toy_prompts(1, 1), plan)
    assert [lp is not None for lp in part.log_prob] == list(plan.noise)


def test_T30_the_planned_correlation_is_that_of_the_paper():
    plan = BranchGRPO(S(sibling_noise=4.0)).plan(ToyPolicy().schedule, 0, np.random.default_rng(0))
    assert plan.correlation == pytest.approx(1 / 17)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"splits": [3, 1]}, "rule.splits: got [3, 1], allowed are rising steps from 0 to 8"),
        ({"splits": [9]}, "rule.splits: got [9]"),
        (
            {"splits": [0, 1], "skip_depths": 8},
            "rule.skip_depths: got 8, allowed is up to the depths after the last split (7)",
        ),
        ({"factor": 40, "splits": [0, 1, 2]}, "rule.splits: got 64000 leaves a sample"),
        ({"extremes": 3}, "rule.extremes: got 3, has no effect without rule.width: extremes"),
        ({"window_steps": 2}, "rule.window_steps: got a number without rule.window"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, expected):
    assert any(expected in line for line in S(**settings).problems(10))
    assert not S().problems(10)


def test_one_leaf_without_a_score_is_counted():
    """Of 16 leaves of 2 samples, not of 2: a share rounded to samples would say that none is missing."""
    policy = ToyPolicy(steps=6)
    trainer = toy_trainer(BranchGRPO(S(splits=[0, 1, 2])), policy, groups=2, group_size=1)
    own = trainer.scorer.rewards["toy"]
    calls = iter([True, False])

    def holey(media, prompts):
        values = own(media, prompts).detach().clone()
        values[3] = float("nan") if next(calls) else values[3]
        return values

    trainer.scorer.rewards["toy"] = Wrapped(holey)
    first, second = trainer.update(0), trainer.update(1)
    assert (first.scored, first.unscored) == (15, 1)
    assert (second.scored, second.unscored) == (16, 0)
