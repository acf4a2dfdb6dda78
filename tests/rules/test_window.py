"""Noisy steps of each prompt's own (Flash-GRPO): tests 67 to 69 of the second generation, and one gradient made of several plans."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from diffalign import config
from diffalign.backends.toy import ToyPolicy
from diffalign.cli import app
from diffalign.errors import UserError
from diffalign.rules import FlowGRPO, GRPOGuard
from diffalign.rules._policy_gradient import step_weights
from diffalign.rules._window import spread_out
from diffalign.runs import devices
from diffalign.runtime.distributed import World
from diffalign.training.sampled import recompute
from diffalign.training.scoring import Clock
from diffalign.types import Schedule
from tests.kit.helpers import gradient, toy_prompts, toy_trainer

CPU = torch.device("cpu")
BOTH = pytest.mark.parametrize("kind", [FlowGRPO, GRPOGuard])


def rule(kind=FlowGRPO, **given):
    """One noisy step of each prompt, among three."""
    return kind(kind.Settings(**{"window_steps": 1, "window_by": "prompt", "step_weight": "equal", **given}))


def sampled(own, groups=5, size=4, **more):
    return toy_trainer(own, ToyPolicy(), groups, size, **more)._sample(0, Clock(CPU))


def flash_kernel(steps: int = 20, shift: float = 3.0, eta: float = 1.0) -> Schedule:
    """Flash-GRPO's own: noise of std g sqrt(h) with g = eta sigma_1 sigma, on a flow's shifted levels as Wan 2.1 has them."""
    even = 1 - np.linspace(1, 1e-3, steps + 1)
    sigma = (shift * even / (1 + (shift - 1) * even))[::-1]
    h, g = -np.diff(sigma), eta * sigma[1] * sigma[:-1]
    gain = h + g**2 * h * (1 - sigma[:-1]) / (2 * sigma[:-1])
    return Schedule(1000 * sigma[:-1], 1 - sigma, sigma, g * np.sqrt(h), gain)


def test_67_equal_weights_of_its_own_kernel_are_the_published_table():
    """1 / c, c = gain / std, of Wan at 20 steps and shift 3, first half, as published to four digits."""
    schedule, half = flash_kernel(), list(range(10))
    assert schedule.timestep[[0, 9]].astype(int).tolist() == [999, 785]
    weights = step_weights(schedule, "equal", half, half)
    table = weights / weights[0] * 7.4770
    np.testing.assert_allclose(table[[1, 2, 9]], [7.0414, 6.6112, 3.7754], atol=5e-5)
    assert weights.mean() == pytest.approx(1)


@BOTH
def test_68_rows_of_other_groups_have_no_noise_no_log_prob_and_no_term_there(kind):
    found = sampled(rule(kind), groups=7)
    assert len(found.parts) > 1
    for part in found.parts:
        plan = part.rollout.plan
        (term,) = plan.updates[0]
        for k, noisy in enumerate(plan.noise):
            assert noisy == (k == term.start)
            assert (part.rollout.log_prob[k] is not None) == noisy
        own = found.prompts.group[part.every]
        assert np.isin(found.prompts.group, own).sum() == len(part.every)  # whole groups
        assert part.rollout.prompts.seed.tolist() == found.prompts.seed[part.every].tolist()
    assert sorted(np.concatenate([part.every for part in found.parts])) == list(range(28))


@BOTH
def test_69_with_one_place_it_is_the_window_of_all(kind):
    each, whole = rule(kind, window=(1, 2)), rule(kind, window=(1, 2), window_by="update")
    given = toy_prompts(3, 4)
    np.testing.assert_array_equal(gradient(each, ToyPolicy(), given), gradient(whole, ToyPolicy(), given))


@BOTH
@pytest.mark.parametrize("inner", [1, 2])
def test_the_gradient_is_the_sum_of_what_each_plans_groups_give_alone(kind, inner):
    """Each part on its own, by a rule whose window is there for all; divided by all samples."""
    given, own = toy_prompts(6, 4), rule(kind, kl=0.3, inner_updates=inner)
    policy = ToyPolicy()
    with torch.no_grad():
        policy.delta.add_(0.1)  # away from the base model, where the divergence has no gradient
    total = gradient(own, policy, given)
    trainer = toy_trainer(own, policy, 6, 4)
    trainer.draw = lambda _: given
    found = trainer._sample(0, Clock(CPU))
    expected = np.zeros_like(total)
    for part in found.parts:
        (term,) = part.rollout.plan.updates[0]
        alone = kind(kind.Settings(kl=0.3, inner_updates=inner, step_weight="equal", window=(0, 3), window_steps=1))
        alone.plan = lambda schedule, update, rng, at=term.start, by=alone: by.plan_at(schedule, (at, at + 1))
        expected += gradient(alone, policy, given.select(part.every)) * len(part.every) / len(given)
    np.testing.assert_allclose(total, expected, rtol=1e-10, atol=1e-13)
    assert np.abs(total).max() > 1e-6


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 6, 16])
def test_the_cut_into_micro_batches_changes_nothing(micro_batch):
    given = toy_prompts(4, 4)
    whole = gradient(rule(), ToyPolicy(), given)
    np.testing.assert_allclose(gradient(rule(), ToyPolicy(), given, micro_batch), whole, rtol=1e-10, atol=1e-13)


def test_the_log_averages_over_all_samples_whatever_plans_they_have():
    trainer = toy_trainer(rule(kl=0.5), ToyPolicy(), 5, 4)
    row = trainer.update(0).row()
    assert row["ratio"] == 1.0
    parts = sampled(rule(kl=0.5)).parts
    assert row["advantage"] == pytest.approx(
        sum(abs(sampled(rule(kl=0.5)).credited({}, p).edges[-1]).sum() for p in parts) / 20
    )


def test_old_log_probs_are_computed_again_for_every_plan():
    trainer = toy_trainer(rule(), ToyPolicy(), 5, 4)
    found = trainer._sample(0, Clock(CPU))
    before = [part.rollout for part in found.parts]
    trainer.policy.micro_batch = 2
    recompute(found.parts, trainer.policy, lambda line: None)
    for part, old in zip(found.parts, before, strict=True):
        assert part.rollout.micro_batch == 2
        for now, then in zip(part.rollout.log_prob, old.log_prob, strict=True):
            assert (now is None) == (then is None)
            if now is not None:
                torch.testing.assert_close(now, then, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("count", "places"), [(4, 9), (9, 4), (1, 5), (5, 1), (8, 8), (7, 3)])
def test_places_are_equally_likely_and_spread(count, places):
    draws, rng = 4000, np.random.default_rng(0)
    seen = np.stack([spread_out(count, places, rng) for _ in range(draws)])
    assert seen.min() == 0 and seen.max() == places - 1
    p = 1 / places
    z = ((seen == 0).mean(0) - p) / np.sqrt(max(p * (1 - p), 1e-12) / draws)
    assert np.abs(z).max() < 4  # for each prompt, of up to nine
    counts = np.stack([(seen == k).sum(1) for k in range(places)])
    assert counts.max(0).max() - counts.min(0).min() <= 2
    assert counts.max() <= -(-count // places) + 1


def test_a_place_differs_between_prompts_and_between_updates():
    trainer = toy_trainer(rule(), ToyPolicy(), 5, 4)
    places = []
    for index in range(4):
        found = trainer._sample(index, Clock(CPU))
        places.append([(part.rollout.plan.updates[0][0].start, part.every.tolist()) for part in found.parts])
    assert all(len(each) > 1 for each in places)
    assert len({str(each) for each in places}) > 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "rule.window_by: got prompt, has no effect without rule.window_steps"),
        ({"window_steps": 1, "window_move": "sliding"}, "a sliding window is at one place"),
        ({"window_steps": 1, "fan": 4}, "allowed is rule.fan: 1, in groups"),
    ],
)
def test_what_it_does_not_go_with_is_refused(given, said):
    with pytest.raises(UserError) as caught:
        config.load(
            "flow_grpo/shapes-sd3",
            ["rule.window=null", *(f"rule.{k}={v}" for k, v in {"window_by": "prompt", **given}.items())],
        )
    assert any(said in line for line in caught.value.problems)


@pytest.mark.parametrize("given", ["rule.window_by: prompt", "rule.last_step"])
def test_groups_of_unequal_size_are_refused_beside_it(given):
    key, _, value = given.partition(": ")
    more = [f"{key}={value or '{weight: 0.1}'}", "rule.window_steps=1", "rewards={shapes_pref: 1.0}"]
    with pytest.raises(UserError) as caught:
        config.load("flow_grpo/shapes-sd3", [*more, "prompts.allocate={least: 4}", "optimizer.micro_batch=4"])
    assert caught.value.problems == (f"prompts.allocate: got it with {given}; allowed is one of the two",)


@pytest.mark.parametrize(
    ("shard", "group", "said"),
    [
        ("none", 2, "allowed are 3 or more"),
        ("blocks", 8, "allowed are multiples of 12"),
        ("none", 4, ""),
        ("blocks", 12, ""),
    ],
)
def test_every_process_has_some_of_each_group(shard, group, said, monkeypatch):
    config_ = config.load(
        "flow_grpo/shapes-sd3",
        [
            "rule.window_steps=1",
            "rule.window_by=prompt",
            f"prompts.group_size={group}",
            "prompts.groups=12",
            f"optimizer.micro_batch={4 if group > 2 else 2}",
            f"memory.shard={shard}",
            *(["device=cuda"] if shard != "none" else []),
        ],
    )
    monkeypatch.setattr(devices, "device", lambda config: "cuda")
    monkeypatch.setattr(devices, "one_order", lambda where: None)
    world = World(rank=0, size=3)
    if not said:
        devices.check(config_, world)
        return
    with pytest.raises(UserError, match=said):
        devices.check(config_, world)


def test_plan_says_that_each_prompt_has_its_own():
    done = CliRunner().invoke(app, ["plan", "flow_grpo/shapes-sd3", "rule.window_steps=1", "rule.window_by=prompt"])
    assert "the plan is drawn anew for every prompt of every update; this is one" in done.output
