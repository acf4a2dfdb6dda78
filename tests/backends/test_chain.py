"""Rollouts, trees, replays and shadows on the toy chain."""

import numpy as np
import pytest
import torch

from diffalign.backends.toy import ToyPolicy
from diffalign.types import Plan, Tree
from tests.kit.helpers import toy_prompts


def noisy(steps: int, stop: int | None = None, **kwargs) -> Plan:
    return Plan(steps if stop is None else stop, (True,) * (steps - 1) + (False,), (), **kwargs)


@pytest.mark.parametrize(("start", "stop"), [(0, 4), (2, 4), (1, 2), (3, 3)])
def test_invariant_4_replay_gives_the_rollouts_values_and_a_graph(start, stop):
    policy = ToyPolicy()
    part = policy.rollout(toy_prompts(2, 3), noisy(4))
    assert not part.x[-1].requires_grad
    found = policy.replay(part, start, stop)
    assert torch.equal(found.x, part.x[stop])
    assert found.x.requires_grad == (stop > start)


def test_sampling_that_stops_early_replays_the_rest_with_the_same_noise():
    policy, given = ToyPolicy(), toy_prompts(2, 3)
    whole, short = policy.rollout(given, noisy(4)), policy.rollout(given, noisy(4, stop=1))
    assert len(short.x) == 2
    assert torch.equal(policy.replay(short, 1, 4).x, whole.x[4])


def test_micro_batches_and_selection_draw_the_same_noise():
    given = toy_prompts(2, 3)
    whole = ToyPolicy().rollout(given, noisy(4))
    cut = ToyPolicy(micro_batch=2).rollout(given, noisy(4))
    alone = ToyPolicy().rollout(given.select([4]), noisy(4))
    for t in range(5):
        torch.testing.assert_close(whole.x[t], cut.x[t], rtol=0, atol=1e-12)
        torch.testing.assert_close(whole.x[t][4:5], alone.x[t], rtol=0, atol=1e-12)


def test_keep_mean_stores_what_each_step_added_noise_to():
    part = ToyPolicy().rollout(toy_prompts(1, 3), noisy(4, keep_mean=True))
    for t in range(3):
        torch.testing.assert_close(part.mean[t] + part.std[t] * part.eps[t], part.x[t + 1])
    assert part.mean[3] is not None
    assert part.eps[3] is None
    assert part.log_prob[3] is None


def test_fan_out_one_is_a_chain_bit_for_bit():
    given = toy_prompts(2, 2)
    chain = ToyPolicy().rollout(given, noisy(4))
    tree = ToyPolicy().rollout(given, noisy(4, branch=(1, 1, 1, 1), correlation=0.3))
    assert all(torch.equal(a, b) for a, b in zip(chain.x, tree.x, strict=True))


@pytest.mark.parametrize(
    ("splits", "forwards", "edges"), [((0, 3, 6, 9), 203, 218), ((0, 4, 8, 12), 169, 184), ((0, 5, 10, 15), 135, 150)]
)
def test_T32_rows_of_a_tree_siblings_share_their_parents_forward(splits, forwards, edges):
    policy = ToyPolicy(steps=20)
    branch = tuple(2 if t in splits else 1 for t in range(20))
    part = policy.rollout(toy_prompts(1, 1), noisy(20, branch=branch))
    assert policy.rows_forward == forwards
    assert sum(len(level) for level in part.tree.parent) == edges
    assert len(part.x[-1]) == 16


def test_T30_sibling_noise_keeps_its_marginal_and_has_the_planned_correlation():
    policy = ToyPolicy(steps=2)
    part = policy.rollout(toy_prompts(1, 20_000), noisy(2, branch=(2, 1), correlation=1 / 17))
    eps = part.eps[0].reshape(-1, 2, 3)
    assert eps.var().item() == pytest.approx(1.0, abs=0.02)
    siblings = (eps[:, 0] * eps[:, 1]).mean().item()
    assert siblings == pytest.approx(1 / 17, abs=0.012)  # 3 standard errors of 60,000 products
    strangers = (eps[1:, 0] * eps[:-1, 1]).mean().item()
    assert abs(strangers) < 0.012


def test_T31_leaves_of_a_tree_are_distributed_as_flat_samples():
    tree = ToyPolicy().rollout(toy_prompts(1, 4000), noisy(4, branch=(2, 1, 2, 1), correlation=0.2)).x[-1]
    flat = ToyPolicy().rollout(toy_prompts(1, 16_000, seed=5), noisy(4)).x[-1]
    torch.testing.assert_close(tree.var(0), flat.var(0), rtol=0.08, atol=0)
    error = (tree.reshape(4000, 4, 3).mean(1).var(0) / 4000 + flat.var(0) / 16_000).sqrt()
    assert (((tree.mean(0) - flat.mean(0)) / error).abs() < 4).all()


def test_selecting_roots_of_a_tree_keeps_whole_families():
    policy, plan = ToyPolicy(), noisy(4, branch=(2, 1, 3, 1))
    part = policy.rollout(toy_prompts(3, 1), plan)
    picked = part.select([2, 0])
    assert [len(x) for x in picked.x] == [2, 4, 4, 12, 12]
    alone = policy.rollout(toy_prompts(3, 1).select([2, 0]), plan)
    for t in range(5):
        torch.testing.assert_close(picked.x[t], alone.x[t], rtol=0, atol=1e-12)
        np.testing.assert_array_equal(picked.tree.root[t], alone.tree.root[t])
    torch.testing.assert_close(policy.replay(picked, 0, 4).x, picked.x[4], rtol=0, atol=1e-12)


def test_tree_grows_and_numbers_families():
    tree = Tree.grow(2, (2, 1))
    assert [level.tolist() for level in tree.root] == [[0, 1], [0, 0, 1, 1], [0, 0, 1, 1]]
    assert [level.tolist() for level in tree.parent] == [[0, 0, 1, 1], [0, 1, 2, 3]]


def test_branching_without_noise_is_refused():
    with pytest.raises(ValueError, match="branches without noise"):
        Plan(2, (True, False), (), branch=(1, 2))


def test_invariant_18_shadows_follow_with_their_decay():
    policy = ToyPolicy()
    policy.add_shadows({"copy": 0.0, "slow": 0.75, "frozen": 1.0})
    with torch.no_grad():
        policy.delta.add_(1.0)
    policy.follow({"copy": 0.0, "slow": 0.75, "frozen": 1.0})
    means = {name: shadow["delta"].mean().item() for name, shadow in policy.shadows.items()}
    assert means == {"copy": 1.0, "slow": 0.25, "frozen": 0.0}


def test_T41_contexts_restore_the_parameters_on_exceptions_and_give_no_gradient():
    policy = ToyPolicy()
    policy.add_shadows({"old": 0.5})
    part = policy.rollout(toy_prompts(1, 2), noisy(4))
    with torch.no_grad():
        policy.delta.add_(0.5)
    own = policy.delta.detach().clone()
    for context in (policy.reference, lambda: policy.shadow("old")):
        with pytest.raises(KeyError), context():
            inside = policy.transition(part, 1).prediction
            raise KeyError
        assert not inside.requires_grad
        assert torch.equal(policy.delta, own)
        assert not torch.equal(policy.transition(part, 1).prediction, inside)
    assert policy.transition(part, 1).prediction.requires_grad


def test_predict_agrees_with_a_transition_at_the_same_time():
    policy = ToyPolicy()
    part = policy.rollout(toy_prompts(1, 4), noisy(4))
    now = policy.transition(part, 2)
    time = torch.full((4,), float(policy.schedule.sigma[2]))
    torch.testing.assert_close(policy.predict(part, part.x[2], time), now.prediction)


def jumping(steps: int = 8, *solver: int) -> Plan:
    return Plan(steps, tuple(k < 2 for k in range(steps)), (), solver=solver or (2, 3, 6))


def test_a_solver_takes_its_steps_and_leaves_out_the_others():
    """Against the update of DPM-Solver++'s algorithm 2 in log(alpha / sigma), with the toy's own network."""
    policy = ToyPolicy(steps=8)
    part = policy.rollout(toy_prompts(2, 3), jumping())
    assert policy.rows_forward == 6 * 5
    sigma, x, clean, h = policy.levels.sigma, part.x[2], None, None
    for s, t in ((2, 3), (3, 6), (6, 8)):
        v = policy.network(x, torch.full((6,), sigma[s], dtype=x.dtype)).detach()
        before, clean = clean, x - sigma[s] * v
        if t == 8:
            x = clean
            break
        old, h = h, np.log((1 - sigma[t]) / sigma[t]) - np.log((1 - sigma[s]) / sigma[s])
        d = clean if before is None else (1 + h / (2 * old)) * clean - h / (2 * old) * before
        x = sigma[t] / sigma[s] * x - (1 - sigma[t]) * np.expm1(-h) * d
        assert torch.allclose(part.x[t], x, rtol=0, atol=1e-12)
    assert torch.allclose(part.x[8], x, rtol=0, atol=1e-12)
    assert all(torch.equal(part.x[level], part.x[6]) for level in (4, 5))
    assert part.eps[2:] == part.log_prob[2:] == [None] * 6
    assert len(part.x) == 9


def test_a_solver_is_replayed_from_where_it_starts_or_before():
    policy = ToyPolicy(steps=8)
    part = policy.rollout(toy_prompts(2, 3), jumping())
    for start in (0, 1, 2):
        assert torch.equal(policy.replay(part, start, 8).x, part.x[8])
    assert torch.equal(policy.transition(part, 1).mean + part.std[1] * part.eps[1], part.x[2])
    cut = ToyPolicy(steps=8, micro_batch=2).rollout(toy_prompts(2, 3), jumping())
    assert torch.allclose(cut.x[8], part.x[8], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="step 3 follows from steps of a solver before it"):
        policy.replay(part, 3, 8)


@pytest.mark.parametrize("plan", [{"noise": (True, True, True)}, {"stop": 2, "noise": (True, False, False)}])
def test_a_solver_has_no_noise_and_goes_to_the_end(plan):
    with pytest.raises(ValueError, match="a solver from step 1 on"):
        Plan(**{"stop": 3, "updates": (), "solver": (1,), **plan})
