"""RLR against full backpropagation. Numbers in names: the invariants of the estimators' notes."""

import numpy as np
import pytest
from hypothesis import given as given_values
from hypothesis import strategies as st

from diffalign.backends.toy import ToyPolicy
from diffalign.rules import RLR
from diffalign.types import Plan, Schedule, Term
from tests.helpers import toy_prompts
from tests.rules.small_rules import FullTruncatedBP
from tests.rules.test_conformance import batches, worst_z

S = RLR.Settings


class FullBP(FullTruncatedBP):
    """Backpropagation through every step, with noise where the rule under test has it."""

    def __init__(self, noisy: list[int]) -> None:
        super().__init__(4)
        self.where = noisy

    def plan(self, schedule, update, rng):
        T = schedule.steps
        return Plan(T, tuple(k in self.where for k in range(T)), ((Term(0, T, "reward"),),))


UNBIASED = [
    S(span=1),
    S(span=2),
    S(span=3),
    S(depth=2, span=1),
    S(depth=2, span=2),
    S(noise=[0, 2], span=1),
    S(noise=[0, 2], span=2),
    S(noise=[2], span=1),
]


@pytest.mark.parametrize("process", ["flow_sde", "ddim"])
@pytest.mark.parametrize("settings", UNBIASED, ids=lambda s: f"K{s.depth}_h{s.span}_{s.noise}")
def test_invariant_2_the_mean_is_that_of_full_backpropagation(settings, process):
    truth = batches(lambda: FullBP(settings.noisy(4)), 100, {"process": process})
    # 15 coordinates: |z| above 4.5 happens once in 10,000 fixed seeds by chance
    assert worst_z(batches(lambda: RLR(settings), 200, {"process": process}), truth) < 4.5


@pytest.mark.parametrize("process", ["flow_sde", "ddim"])
def test_invariant_2_without_the_remaining_steps_it_is_not(process):
    settings = S(span=2, cover="none")
    truth = batches(lambda: FullBP([0, 1, 2]), 100, {"process": process})
    assert worst_z(batches(lambda: RLR(settings), 200, {"process": process}), truth) > 4.5


def test_invariant_10_groups_of_two_are_unbiased_too():
    """A baseline that holds the sample itself would shrink the likelihood-ratio part to half with groups of two."""
    truth = batches(lambda: FullBP([0, 1, 2]), 100)
    assert worst_z(batches(lambda: RLR(S(span=2)), 200, size=2), truth) < 4.5


@given_values(st.integers(2, 12), st.data())
def test_every_copy_is_covered_exactly_once(steps, data):
    depth = data.draw(st.integers(1, steps - 1))
    last = steps - depth - 1
    noise = sorted({*data.draw(st.lists(st.integers(0, last))), last})
    settings = S(depth=depth, noise=noise, span=data.draw(st.integers(1, len(noise))))
    assert not settings.problems(steps)
    schedule = Schedule(np.arange(steps), np.ones(steps + 1), np.ones(steps + 1), np.ones(steps), np.ones(steps))
    plan = RLR(settings).plan(schedule, 0, np.random.default_rng(data.draw(st.integers(0, 99))))
    covered = [k for term in plan.updates[0] for k in range(term.start, term.stop)]
    assert sorted(covered) == list(range(steps))
    for term in plan.updates[0]:
        assert term.through == "reward" or plan.noise[term.stop - 1]


def test_the_span_ends_where_the_noise_is_large_enough():
    std = np.array([0.5, 0.4, 0.01, 0.3, 0.0])
    schedule = Schedule(np.arange(5), np.ones(6), np.ones(6), std, np.ones(5))
    rng = np.random.default_rng(0)
    ends = {RLR(S(span=1, least_std=0.1)).plan(schedule, 0, rng).updates[0][1].stop - 1 for _ in range(50)}
    assert ends == {0, 1, 3}


def test_invariant_4_a_replayed_span_ends_on_the_stored_latent():
    policy, rule, given = ToyPolicy(), RLR(), toy_prompts(2, 4)
    plan = rule.plan(policy.schedule, 0, np.random.default_rng(0))
    part = policy.rollout(given, plan)
    for term in plan.updates[0][1:]:
        assert rule.loss(term, policy, part, [np.ones(8)] * 4, lambda media: media.pixels).gap.item() == 0.0
    part.x[1][0, 0] += 1e-3
    gaps = [rule.loss(t, policy, part, [np.ones(8)] * 4, lambda m: m.pixels).gap.item() for t in plan.updates[0][1:]]
    assert max(gaps) > 1e-4


def test_invariant_6_variance_lies_between_backpropagation_and_score_functions():
    from tests.rules.small_rules import Reinforce

    found = {
        name: batches(make, 300).var(0, ddof=1).sum()
        for name, make in {
            "bp": lambda: FullBP([0, 1, 2]),
            "rlr": lambda: RLR(S(depth=2, span=1)),
            "reinforce": lambda: Reinforce(noisy=4),
        }.items()
    }
    assert found["bp"] < found["rlr"]
    assert found["reinforce"] > 1.3 * found["rlr"]


def test_a_pathwise_term_learns_where_all_rewards_are_equal():
    """Leave-one-out credit is 0 then; the update is not skipped."""
    from tests.helpers import toy_trainer

    trainer = toy_trainer(RLR(), ToyPolicy())
    trainer.rewards = {"toy": lambda media, prompts: media.pixels.flatten(1).sum(1) * 0 + 1}
    assert "skipped_flat" not in trainer.update(0)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"depth": 10}, "rule.depth: got 10, allowed is less than sampler.steps (10)"),
        ({"span": 10}, "rule.span: got 10, allowed is 1 to the number of noisy steps (9)"),
        ({"noise": [0, 3]}, "rule.noise: got [0, 3], allowed are steps 0 to 8 with 8"),
        ({"noise": [-1, 8]}, "rule.noise: got [-1, 8]"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, expected):
    assert any(expected in line for line in S(**settings).problems(10))
    assert not S().problems(10)
