import numpy as np
import pytest
import torch

from diffalign import config
from diffalign.backends.toy import ToyPolicy
from diffalign.errors import Fault, UserError
from diffalign.rules import FlowGRPO, GRPOGuard
from diffalign.training.backward import Share
from diffalign.types import Credit, Scores, Term, Tree
from tests.kit.helpers import gradient, rolled, toy_prompts, toy_trainer

S = FlowGRPO.Settings


def test_plan_has_noise_in_the_window_and_never_on_the_last_step():
    schedule = ToyPolicy(steps=6).schedule
    plan = FlowGRPO().plan(schedule, 0, np.random.default_rng(0))
    assert plan.noise == (True,) * 5 + (False,)
    assert [term.start for term in plan.updates[0]] == [0, 1, 2, 3, 4]
    plan = FlowGRPO(S(window=(1, 3), inner_updates=2)).plan(schedule, 0, np.random.default_rng(0))
    assert plan.noise == (False, True, True, False, False, False)
    assert plan.stop == 6
    assert len(plan.updates) == 2


def test_term_weights_average_to_one_over_the_steps():
    schedule = ToyPolicy(steps=6).schedule
    for weight in ("none", "equal"):
        terms = FlowGRPO(S(step_weight=weight)).plan(schedule, 0, np.random.default_rng(0)).updates[0]
        assert sum(term.weight for term in terms) == pytest.approx(1.0)


class Watched(ToyPolicy):
    """Keeps the predictions of steps, with their gradients."""

    def transition(self, part, step):
        found = super().transition(part, step)
        if found.prediction.requires_grad:
            found.prediction.retain_grad()
            self.seen = found.prediction
        return found


def pulls(rule, policy: Watched) -> list[float]:
    """How strongly each step's loss pulls at its prediction, for an advantage of 1 and noise of size 1: by autograd."""
    plan, part, credit = rolled(rule, policy)
    ones = Credit([np.ones_like(edges) for edges in credit.edges])
    found = []
    for term in plan.updates[0]:
        (rule.loss(term, policy, part, ones, None).value * term.weight).backward()
        noise = part.eps[term.start]
        found.append(float((policy.seen.grad / noise).abs().mean()))
    return found


@pytest.mark.parametrize("process", ["flow_sde", "cps"])
@pytest.mark.parametrize(
    "rule",
    [
        FlowGRPO(S(step_weight="equal")),
        FlowGRPO(S(step_weight="equal", ratio="unweighted")),
        GRPOGuard(GRPOGuard.Settings(step_weight="equal")),
        GRPOGuard(GRPOGuard.Settings(step_weight="equal", ratio_norm="mean")),
    ],
    ids=["flow_grpo", "unweighted", "guard", "guard_mean"],
)
def test_equal_step_weight_gives_every_step_the_same_gradient_on_the_prediction(rule, process):
    """With cps, 8 steps and level 0.8 an unweighted ratio pulled 49 times harder at one step than at another."""
    found = pulls(rule, Watched(steps=8, dim=3, process=process, noise_level=0.8))
    np.testing.assert_allclose(found, found[0], rtol=1e-9)


@pytest.mark.parametrize("weight", ["equal", "std", "inv_dt"])
def test_66_a_step_weighs_the_same_whichever_is_drawn_with_it(weight):
    """Weights of mean 1 over the window: drawn one at a time, steps keep their differences."""
    schedule = ToyPolicy(steps=10).schedule
    whole = FlowGRPO(S(step_weight=weight)).plan(schedule, 0, np.random.default_rng(0)).updates[0]
    expected = {term.start: term.weight * len(whole) for term in whole}
    drawn = FlowGRPO(S(step_weight=weight, window_steps=1))
    for update in range(20):
        (term,) = drawn.plan(schedule, update, np.random.default_rng(update)).updates[0]
        assert term.weight == pytest.approx(expected[term.start], rel=1e-12)
    assert np.mean(list(expected.values())) == pytest.approx(1)
    assert weight == "inv_dt" or max(expected.values()) > 1.5 * min(expected.values())  # evenly spaced levels


def test_T16_gradient_is_minus_advantage_times_score():
    policy, rule = ToyPolicy(), FlowGRPO(S(scale="none"))
    plan, part, credit = rolled(rule, policy)
    found = gradient(rule, policy, toy_prompts(2, 8))
    delta = torch.zeros_like(policy.base).requires_grad_()
    total = 0.0
    for term in plan.updates[0]:
        k, x = term.start, part.x[term.start]
        time = torch.full((len(x), 1), float(policy.schedule.sigma[k]), dtype=x.dtype)
        v = torch.cat([x, time, torch.ones_like(time)], 1) @ (policy.base + delta).T
        mean = float(policy.noisy.x[k]) * x + float(policy.noisy.prediction[k]) * v
        log_prob = torch.distributions.Normal(mean, part.std[k]).log_prob(part.x[k + 1]).mean(1)
        total = total - (torch.from_numpy(credit.edges[k]) * log_prob).mean() / 3
    total.backward()
    np.testing.assert_allclose(found, delta.grad.numpy(), atol=1e-12)


def test_T12_first_pass_ratio_is_exactly_one():
    policy, rule = ToyPolicy(), FlowGRPO()
    plan, part, credit = rolled(rule, policy)
    for term in plan.updates[0]:
        loss = rule.loss(term, policy, part, credit, lambda media: media.pixels)
        assert loss.gap.item() == 0.0
        assert loss.metrics["ratio"].item() == 1.0


def test_off_policy_the_ratio_moves_and_only_the_first_pass_is_held_to_one():
    policy = ToyPolicy()
    trainer = toy_trainer(FlowGRPO(S(inner_updates=3, clip=1e-3)), policy)
    metrics = trainer.update(0).metrics
    assert metrics["ratio"] != 1.0
    assert metrics["clip_low"] + metrics["clip_high"] > 0


@pytest.mark.parametrize("what", ["x", "log_prob"])
def test_a_changed_rollout_is_caught(what):
    policy, rule = ToyPolicy(), FlowGRPO()
    plan, part, credit = rolled(rule, policy)
    getattr(part, what)[1][3] += 1e-6
    trainer = toy_trainer(rule, policy, 2, 8)
    with pytest.raises(Fault, match="the replay differs from the rollout by"):
        trainer.backward.accumulate([Share(plan.updates[0], part, [credit] * len(plan.updates[0]))], first=True)
    trainer.backward.accumulate([Share(plan.updates[0], part, [credit] * len(plan.updates[0]))], first=False)


def test_T12_rounding_latents_for_storage_after_their_log_prob_is_caught_off_the_cpu_too():
    from diffalign.training.backward import CLOSE_GAP

    policy, rule = ToyPolicy(process="dance_sde", noise_level=0.3, steps=10), FlowGRPO()
    plan, part, credit = rolled(rule, policy)
    part.x[:] = [x.bfloat16().double() for x in part.x]
    gaps = [float(rule.loss(t, policy, part, credit, lambda media: media.pixels).gap) for t in plan.updates[0]]
    assert min(gaps) > CLOSE_GAP


def test_T40_kl_is_zero_with_zero_gradient_at_the_reference_and_pulls_back_from_elsewhere():
    policy, rule = ToyPolicy(), FlowGRPO(S(kl=0.5))
    plan, part, credit = rolled(rule, policy)
    flat = Credit([np.zeros_like(edges) for edges in credit.edges])
    trainer = toy_trainer(rule, policy, 2, 8)
    metrics = trainer.backward.accumulate([Share(plan.updates[0], part, [flat] * len(plan.updates[0]))], first=True)
    assert metrics["kl"] == metrics["norm_radial"] == 0 and metrics["norm_ratio"] == 1
    assert policy.delta.grad.abs().max() == 0
    with torch.no_grad():
        policy.delta.add_(0.1)
    plan, part, _ = rolled(rule, policy)
    trainer.optimizer.zero_grad()
    trainer.backward.accumulate([Share(plan.updates[0], part, [flat] * len(plan.updates[0]))], first=True)
    # L = kl mean_{steps, samples, dims} (delta [x, t, 1])^2, by hand
    delta = policy.delta.detach().clone().requires_grad_()
    total = 0.0
    for term in plan.updates[0]:
        x = part.x[term.start]
        time = torch.full((len(x), 1), float(policy.schedule.sigma[term.start]), dtype=x.dtype)
        total = total + 0.5 * ((torch.cat([x, time, torch.ones_like(time)], 1) @ delta.T) ** 2).mean() / 3
    total.backward()
    torch.testing.assert_close(policy.delta.grad, delta.grad, rtol=1e-9, atol=1e-12)


def test_kl_weight_does_not_depend_on_step_weights():
    grads = []
    for weight in ("none", "equal"):
        policy, rule = ToyPolicy(), FlowGRPO(S(kl=0.5, step_weight=weight))
        with torch.no_grad():
            policy.delta.add_(0.1)
        plan, part, credit = rolled(rule, policy)
        flat = Credit([np.zeros_like(edges) for edges in credit.edges])
        toy_trainer(rule, policy, 2, 8).backward.accumulate(
            [Share(plan.updates[0], part, [flat] * len(plan.updates[0]))], first=True
        )
        grads.append(policy.delta.grad.clone())
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-14)


def test_credit_is_the_leafs_advantage_on_every_edge():
    tree, given = Tree.grow(6, (1, 1, 1)), toy_prompts(2, 3)
    scores = Scores({}, np.array([0.0, 1.0, 2.0, 5.0, 5.0, 5.0]), np.ones(6, bool))
    credit = FlowGRPO().credit(tree, scores, given).edges
    assert len(credit) == 3
    for edges in credit:
        np.testing.assert_allclose(edges, [-(1.5**0.5), 0, 1.5**0.5, 0, 0, 0], rtol=1e-12)


def test_shared_start_gives_a_group_one_initial_noise_and_members_their_own_path():
    policy, rule = ToyPolicy(), FlowGRPO(S(shared_start=True))
    _, part, _ = rolled(rule, policy)
    assert (part.x[0][:8] == part.x[0][0]).all()
    assert not torch.equal(part.x[0][0], part.x[0][8])
    assert not torch.equal(part.x[1][0], part.x[1][1])


def test_a_window_outside_the_sampler_is_refused():
    expected = "rule.window: got [2, 9], allowed is 0 <= first < stop <= sampler.steps (8)"
    assert S(window=(2, 9)).problems(8)[0].startswith(expected)
    assert S(window=(7, 8)).problems(8)
    assert not S().problems(8)
    assert not S(window=(0, 8)).problems(8)


def test_terms_outside_the_chain_are_refused():
    from diffalign.types import Plan

    with pytest.raises(ValueError, match="outside"):
        Plan(3, (True, True, False), ((Term(2, 4, "log_prob"),),))


# -- windows, shared beginnings, selection


def starts(settings, updates: int, steps: int = 10) -> list[tuple[int, ...]]:
    rule, schedule = FlowGRPO(settings), ToyPolicy(steps=steps).schedule
    plans = [rule.plan(schedule, k, np.random.default_rng([7, k])) for k in range(updates)]
    return [tuple(k for k, on in enumerate(plan.noise) if on) for plan in plans]


def test_T27_a_random_window_starts_everywhere_alike():
    found = starts(S(window=(0, 5), window_steps=3), 3000)
    assert all(len(window) == 3 and window[-1] - window[0] == 2 for window in found)
    counts = np.bincount([window[0] for window in found], minlength=3)
    assert (np.abs(counts - 1000) < 4.5 * 25.8).all()  # three starts; standard deviation 25.8
    assert {window[0] for window in starts(S(window_steps=2), 300)} == set(range(8))  # never the last step


def test_T28_a_sliding_window_is_never_short_and_wraps():
    found = starts(S(window_steps=4, window_move="sliding", window_every=2), 14, steps=8)
    assert [window[0] for window in found] == [0, 0, 1, 1, 2, 2, 3, 3, 0, 0, 1, 1, 2, 2]
    assert all(len(window) == 4 for window in found)


def test_T29_only_the_window_is_trained_and_has_log_probs():
    policy, rule = ToyPolicy(steps=8), FlowGRPO(S(window=(2, 6), window_steps=2))
    given = toy_prompts(2, 4)
    plan = rule.plan(policy.schedule, 0, np.random.default_rng(0))
    part = policy.rollout(given, plan)
    noisy = [k for k, on in enumerate(plan.noise) if on]
    assert [k for k, log_prob in enumerate(part.log_prob) if log_prob is not None] == noisy
    assert [term.start for term in plan.updates[0]] == noisy
    trainer = toy_trainer(rule, policy, 2, 4)
    before = policy.rows_forward
    trainer.update(0)
    assert policy.rows_forward - before == 8 * 8 + 8 * 2  # T steps to sample, w to train


def test_a_fan_shares_the_beginning_and_its_cost():
    policy, rule = ToyPolicy(steps=8), FlowGRPO(S(window=(3, 5), fan=6))
    assert not rule.needs.groups
    trainer = toy_trainer(rule, policy, 2, 1)
    trainer.update(0)
    # sampling: 4 steps of 2 rows, 4 of 12; training: one step of 2 rows, one of 12
    assert policy.rows_forward == 4 * 2 + 4 * 12 + 2 + 12
    part = policy.rollout(toy_prompts(2, 1), rule.plan(policy.schedule, 0, np.random.default_rng(0)))
    assert [len(x) for x in part.x] == [2, 2, 2, 2, 12, 12, 12, 12, 12]
    assert len(torch.unique(part.x[4], dim=0)) == 12


def test_best_and_worst_are_learned_from():
    tree, given = Tree.grow(8, (1, 1)), toy_prompts(2, 4)
    scores = Scores({}, np.array([0.0, 3.0, 1.0, 2.0, 5.0, 5.0, 9.0, 1.0]), np.ones(8, bool))
    whole, kept = (FlowGRPO(S(keep=keep)).credit(tree, scores, given).edges[-1] for keep in (None, 2))
    assert np.flatnonzero(kept).tolist() == [0, 1, 6, 7]
    np.testing.assert_array_equal(kept[kept != 0], whole[kept != 0])  # normalised before the selection
    assert S(keep=3).problems(10) == ["rule.keep: got 3, allowed are even numbers: half best, half worst"]


def test_T40_the_means_divergence_is_that_of_the_gaussians():
    policy, rule = ToyPolicy(), FlowGRPO(S(kl=0.5, kl_space="mean"))
    plan, part, credit = rolled(rule, policy)
    with torch.no_grad():
        policy.delta.add_(0.1)
    term = plan.updates[0][1]
    now = policy.transition(part, term.start)
    with policy.reference():
        base = policy.transition(part, term.start)
    torch_kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(now.mean, now.std), torch.distributions.Normal(base.mean, base.std)
    ).mean()
    found = rule.loss(term, policy, part, credit, None).metrics["kl"]
    torch.testing.assert_close(found, torch_kl.detach(), rtol=1e-9, atol=0)
    # the same in the prediction's difference: gain^2 mean(dv^2) / (2 s^2)
    gain = policy.schedule.gain[term.start]
    by_v = gain**2 * ((now.prediction - base.prediction) ** 2).mean() / (2 * now.std**2)
    torch.testing.assert_close(found, by_v.detach(), rtol=1e-9, atol=0)


def test_unweighted_ratios_lack_the_variance():
    policy = ToyPolicy(process="cps", noise_level=0.8)
    rule = FlowGRPO(S(ratio="unweighted", inner_updates=2))
    plan, part, credit = rolled(rule, policy)
    with torch.no_grad():
        policy.delta.add_(0.05)
    for term in plan.updates[0]:
        k = term.start
        now = policy.transition(part, k)
        old_mean = part.x[k + 1] - part.std[k] * part.eps[k]
        expected = (-((part.x[k + 1] - now.mean) ** 2) + (part.x[k + 1] - old_mean) ** 2).mean(1)
        found = rule.loss(term, policy, part, credit, None).metrics["ratio"]
        torch.testing.assert_close(found, expected.exp().mean().detach(), rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"window": (0, 4), "window_steps": 5},
            "rule.window_steps: got 5, allowed is up to the window's noisy steps (4)",
        ),
        ({"window_steps": 8}, "rule.window_steps: got 8, allowed is up to the window's noisy steps (7)"),
    ],
)
def test_windows_that_do_not_fit_are_named(settings, expected):
    assert S(**settings).problems(8) == [expected]


def test_settings_that_nothing_uses_are_refused_and_defaults_are_not():
    expected = ["rule.window_move: got sliding, has no effect without rule.window_steps"]
    assert S(window_move="sliding").problems(8) == expected
    assert not S(**S().model_dump()).problems(8)


# -- several rewards


def judged(weights: dict[str, float], **columns: list[float]) -> Scores:
    by_name = {name: np.array(values, float) for name, values in columns.items()}
    total = sum(weights[name] * values for name, values in by_name.items())
    return Scores(by_name, total, np.isfinite(total), weights)


TREE8 = Tree.grow(8, (1,))


def leaf(settings, scores: Scores) -> np.ndarray:
    return FlowGRPO(settings).credit(TREE8, scores, toy_prompts(2, 4)).edges[-1]


def test_T25_each_reward_can_be_normalised_by_itself():
    big, small = [0, 10, 20, 30, 5, 5, 6, 6], [0.3, 0.2, 0.1, 0.0, 0.1, 0.2, 0.1, 0.2]
    scores = judged({"big": 1.0, "small": 2.0}, big=big, small=small)
    alone = {n: leaf(S(), judged({n: 1.0}, **{n: v})) for n, v in (("big", big), ("small", small))}
    np.testing.assert_allclose(leaf(S(combine="normalised"), scores), alone["big"] + 2 * alone["small"])
    # summed, the big one decides alone
    assert np.corrcoef(leaf(S(), scores)[:4], alone["big"][:4])[0, 1] > 0.999
    np.testing.assert_allclose(leaf(S(combine="normalised"), judged({"big": 1.0}, big=big)), alone["big"])


def test_a_gate_puts_what_falls_short_last():
    scores = judged({"a": 1.0, "b": 0.0}, a=[1, 2, 3, 4, 1, 2, 3, 4], b=[1, 1, 1, 0, 1, 1, 1, 1])
    found = leaf(S(gate={"b": 0.5}), scores)
    assert found[3] == found[0] == found[:4].min()  # the best by a, but below the gate
    np.testing.assert_allclose(found[4:], leaf(S(), scores)[4:])
    with pytest.raises(UserError, match="rule.gate: got 'c', allowed are this run's rewards: a, b"):
        leaf(S(gate={"c": 0.5}), scores)


def test_leave_one_out_compares_with_the_others_and_is_divided_and_limited_as_asked():
    scores, apart = judged({"a": 1.0}, a=[0, 1, 2, 3, 4, 4, 4, 4]), np.array([0, 1, 2, 3])
    found = leaf(S(baseline="leave_one_out", scale="none"), scores)
    np.testing.assert_allclose(found[:4], apart - (6 - apart) / 3)
    assert (found[4:] == 0).all()
    np.testing.assert_allclose(leaf(S(baseline="leave_one_out"), scores)[:4], found[:4] / apart.std())
    assert np.abs(leaf(S(baseline="leave_one_out", advantage_limit=0.5), scores)).max() == 0.5


@pytest.mark.parametrize(
    ("window", "share", "solver"),
    [((0, 4), 0.4, (4, 7)), ((0, 4), 1.0, (4, 5, 6, 7, 8, 9)), ((1, 3), 0.5, (3, 4, 6, 8)), ((0, 8), 0.1, (8,))],
)
def test_flash_leaves_out_steps_after_the_window(window, share, solver):
    plan = FlowGRPO(S(window=window, flash=share)).plan(ToyPolicy(steps=10).schedule, 0, np.random.default_rng(0))
    assert plan.solver == solver
    assert plan.noise == tuple(window[0] <= k < window[1] for k in range(10))


def test_flash_costs_a_call_for_each_step_it_takes():
    policy = ToyPolicy(steps=10)
    toy_trainer(FlowGRPO(S(window=(0, 4), flash=0.4)), policy, 2, 4).update(0)
    assert policy.rows_forward == 8 * (4 + 2) + 8 * 4
    assert policy.rows_backward == 8 * 4


def test_risk_is_credit_of_whole_bundles():
    rule = FlowGRPO(S(risk={"bundle": 2, "low": 0.5, "high": 1.0, "weight": 1.0}, scale="none"))
    given = toy_prompts(2, 3)
    total = np.array([0.0, 1.0, 5.0, 0.0, 2.0, 1.0])  # bundles 0, 3, 6: quantiles 3 and 6
    scores = Scores({"toy": total}, total, np.ones(6, bool), {"toy": 1.0})
    tree = Tree.grow(6, (1,))
    value = np.array([(-3 / 0.5 - 3 / 0.5) / 2, (0 - 3 / 0.5) / 2, 0.0])
    expected = np.clip(np.tile(value - value.mean(), 2), -5, 5)
    np.testing.assert_allclose(rule.credit(tree, scores, given).edges[0], expected)


def test_risk_and_flash_settings_are_checked_with_everything_else():
    with pytest.raises(UserError) as caught:
        config.load(
            "flow_grpo/shapes-sd3", ["rule.risk={bundle: 3, low: 0.9, high: 0.2}", "rule.window=null", "rule.flash=0.5"]
        )
    assert any(
        "rule.risk.low: got 0.9, allowed is less than rule.risk.high (0.2)" in line for line in caught.value.problems
    )
    assert any("rule.flash: got 0.5, has no effect without rule.window" in line for line in caught.value.problems)
    assert any(
        "prompts.groups: got 4, allowed are multiples of rule.risk.bundle (3)" in line for line in caught.value.problems
    )


def test_an_unknown_key_of_risk_is_told_those_of_risk():
    with pytest.raises(UserError, match=r"rule.risk.alpha: unknown key; known are low, high, weight, bundle"):
        config.load("flow_grpo/shapes-sd3", ["rule.risk={bundle: 2, alpha: 2}"])


def test_a_divergence_of_means_needs_a_divergence():
    with pytest.raises(UserError, match=r"rule.kl_space: got mean, has no effect without rule.kl"):
        config.load("flow_grpo/shapes-sd3", ["rule.kl_space=mean"])
    assert config.load("flow_grpo/shapes-sd3", ["rule.kl_space=mean", "rule.kl=0.1"]).rule["kl"] == 0.1
