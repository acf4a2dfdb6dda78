"""RLR against full backpropagation. Numbers in names: the invariants of the estimators' notes."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given as given_values
from hypothesis import strategies as st

from diffalign.backends.toy import ToyPolicy
from diffalign.rewards.base import Wrapped
from diffalign.rules import RLR
from diffalign.types import Credit, Plan, Schedule, Term
from tests.kit.helpers import toy_prompts, toy_reward
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
    S(depth=2, noise=[0, 1, 2], span=1),
    S(span=1, cover="is"),
    S(span=2, cover="is"),
    S(depth=2, span=1, cover="is", start="norms"),
    S(span=2, cover="zo", pairs=4),
    S(noise=[0, 2], span=1, cover="zo", pairs=4),
    S(span=2, start="norms", least_std=0.0),
    S(span=1, between=(1, 3)),
]


def with_norms(settings):
    """A rule that has seen gradients of very different norms."""
    rule = RLR(settings)
    rule.norms = {f"{a}-{b}": 1.0 + 3 * a for a, b in settings.spans(4, settings.depth, settings.span)}
    return rule


def form(settings):
    return f"K{settings.depth}_h{settings.span}_{settings.noise}_{settings.cover}_{settings.start}"


# Each form under one process in every run of the suite, under the other in CI.
UNDER = [
    pytest.param(settings, process, marks=pytest.mark.wide if (k + j) % 2 else (), id=f"{form(settings)}-{process}")
    for k, settings in enumerate(UNBIASED)
    for j, process in enumerate(["flow_sde", "ddim"])
]


@pytest.mark.parametrize(("settings", "process"), UNDER)
def test_invariants_2_7_8_the_mean_is_that_of_full_backpropagation(settings, process):
    truth = batches(lambda: FullBP(settings.noisy(4, settings.depth)), 100, {"process": process})
    # 15 coordinates: |z| above 4.5 happens once in 10,000 fixed seeds by chance
    assert worst_z(batches(lambda: with_norms(settings), 200, {"process": process}), truth) < 4.5


def test_reinforce_is_a_depth_of_0():
    truth = batches(lambda: FullBP([0, 1, 2, 3]), 100)
    assert worst_z(batches(lambda: RLR(S(depth=0, span=1)), 200), truth) < 4.5
    assert not RLR(S(depth=0, span=1)).needs.differentiable_reward


@pytest.mark.parametrize("process", ["flow_sde", "ddim"])
@pytest.mark.parametrize("released", [False, True], ids=["rlr_without_the_rest", "released_code"])
def test_invariant_2_without_the_remaining_steps_it_is_not(process, released):
    """The released code has one pathwise step and single random steps, without weight."""
    settings = S(span=1 if released else 2, cover="none")
    truth = batches(lambda: FullBP([0, 1, 2]), 100, {"process": process})
    # least found: 9.4 with the rest of one step missing, 21 with two
    assert worst_z(batches(lambda: RLR(settings), 200, {"process": process}), truth) > (15 if released else 6)


def test_invariant_8_blocks_without_their_weight_are_biased():
    class Unweighted(RLR):
        def plan(self, schedule, update, rng):
            found = super().plan(schedule, update, rng)
            return replace(found, updates=(tuple(replace(term, weight=1.0) for term in found.updates[0]),))

    truth = batches(lambda: FullBP([0, 1, 2]), 100)
    assert worst_z(batches(lambda: Unweighted(S(span=1, cover="is")), 200), truth) > 10


def test_invariant_9_parameter_noise_is_biased_by_its_square():
    """On the chain; the derivative of the smoothed reward is that of the reward up to s^2."""
    given, steps = toy_prompts(1, 64), (0, 1, 2)
    policy = ToyPolicy()
    rule = RLR(S(cover="zo", span=1))
    part = policy.rollout(given, Plan(4, (True, True, True, False), ()))

    def from_step(first: int) -> np.ndarray:
        policy.delta.grad = None
        (-toy_reward(policy.decode(part, policy.replay(part, first, 4).x), given).mean()).backward()
        return policy.delta.grad.numpy().copy()

    exact = from_step(0) - from_step(3)  # the last step's copy is the pathwise term's

    def estimate(scale: float) -> tuple[np.ndarray, np.ndarray]:
        rule.settings = S(cover="zo", span=1, perturbation=scale)
        found = []
        for draw in range(1, 3001):
            policy.delta.grad = None
            term = Term(0, 4, "parameters", steps=steps, draw=draw)
            rule.loss(term, policy, part, None, lambda media: toy_reward(media, given)).value.backward()
            found.append(policy.delta.grad.numpy().copy())
        return np.mean(found, 0), np.std(found, 0) / len(found) ** 0.5

    near, error = estimate(0.02)
    assert np.abs((near - exact) / error).max() < 4.5
    far, error = estimate(3.0)
    assert np.abs((far - exact) / error).max() > 8


def test_invariant_10_groups_of_two_are_unbiased_too():
    """A baseline that holds the sample itself would shrink the likelihood-ratio part to half with groups of two."""
    truth = batches(lambda: FullBP([0, 1, 2]), 100)
    assert worst_z(batches(lambda: RLR(S(span=2)), 200, size=2), truth) < 4.5


@given_values(st.integers(2, 12), st.data())
def test_every_copy_is_covered_exactly_once(steps, data):
    depth = data.draw(st.integers(1, steps - 1))
    last = steps - depth - 1
    noise = sorted({*data.draw(st.lists(st.integers(0, last))), last})
    noise = sorted({*noise, *data.draw(st.lists(st.integers(last, steps - 1)))})
    cover = data.draw(st.sampled_from(["lr", "zo"]))
    most = sum(k <= last for k in noise)
    settings = S(depth=depth, noise=noise, span=data.draw(st.integers(1, most)), cover=cover)
    assert not settings.problems(steps)
    schedule = Schedule(np.arange(steps), np.ones(steps + 1), np.ones(steps + 1), np.ones(steps), np.ones(steps))
    plan = RLR(settings).plan(schedule, 0, np.random.default_rng(data.draw(st.integers(0, 99))))
    covered = [k for term in plan.updates[0] for k in term.steps or range(term.start, term.stop)]
    assert sorted(covered) == list(range(steps))
    for term in plan.updates[0]:
        assert term.through != "log_prob" or plan.noise[term.stop - 1]


@given_values(st.integers(2, 12), st.data())
def test_blocks_cover_every_copy_once_before_the_depth(steps, data):
    depth = data.draw(st.integers(0, steps - 1))
    settings = S(depth=depth, span=data.draw(st.integers(1, steps - depth)), cover="is")
    blocks = settings.spans(steps, depth, settings.span)
    assert [k for a, b in blocks for k in range(a, b)] == list(range(steps - depth))


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
        assert rule.loss(term, policy, part, Credit([np.ones(8)] * 4), lambda media: media.pixels).gap.item() == 0.0
    part.x[1][0, 0] += 1e-3
    gaps = [
        rule.loss(t, policy, part, Credit([np.ones(8)] * 4), lambda m: m.pixels).gap.item() for t in plan.updates[0][1:]
    ]
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
    from tests.kit.helpers import toy_trainer

    trainer = toy_trainer(RLR(), ToyPolicy())
    trainer.scorer.rewards["toy"] = Wrapped(lambda media, prompts: media.pixels.flatten(1).sum(1) * 0 + 1)
    assert not trainer.update(0).flat


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"depth": 10}, "rule.depth: got 10, allowed is less than sampler.steps (10)"),
        ({"span": 10}, "rule.span: got 10, allowed is 1 to the number of noisy steps before the last rule.depth (9)"),
        ({"noise": [0, 3]}, "rule.noise: got [0, 3], allowed are steps 0 to 9 with 8"),
        ({"between": (4, 5)}, "rule.between: got [4, 5], no span of 2 noisy steps lies in it"),
        ({"between": (4, 11)}, "rule.between: got [4, 11], allowed is 0 <= first < stop <= sampler.steps (10)"),
        ({"between": (0, 5), "cover": "is"}, "rule.between: got steps with cover is"),
        ({"depth": "auto"}, "rule.memory_gib: got None with depth auto and span 2"),
        ({"pairs": 3}, "rule.pairs: got 3, has no effect without cover zo"),
        ({"memory_gib": 1.0}, "rule.memory_gib: got 1.0 with depth 1 and span 2"),
        ({"depth": "auto", "memory_gib": 1.0, "noise": [8]}, "rule.depth: got auto with rule.noise"),
        ({"noise": [-1, 8]}, "rule.noise: got [-1, 8]"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, expected):
    assert any(expected in line for line in S(**settings).problems(10))
    assert not S().problems(10)
