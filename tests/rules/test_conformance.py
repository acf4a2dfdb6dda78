"""One list, one promise: every rule in `RULES`, and small forms of what the protocol must carry, on the Gaussian chain."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from diffalign.backends.toy import ToyPolicy
from diffalign.rules import AWM, NFT, RULES, Distil, FlowGRPO, GRPOGuard, Rule
from diffalign.rules import RLR as RLRRule
from diffalign.rules import TruncatedBP as TBP
from diffalign.types import Plan, Scores, Term
from tests.kit import ROOT
from tests.kit.helpers import gradient, rolled, toy_prompts, toy_reward, toy_trainer
from tests.rules.small_rules import RLR, Branching, FullTruncatedBP, Matching, Reinforce, TruncatedBP

SMALL = {
    "truncated_bp": lambda: TruncatedBP(2),
    "bp": lambda: FullTruncatedBP(4),
    "reinforce": Reinforce,
    "rlr": RLR,
    "branching": Branching,
    "matching": Matching,
}
ANCHOR = {"count": 20, "rows": 12, "times": 2, "weight": 0.02}
FORMS = {
    "distil": lambda: Distil(Distil.Settings(teachers={"*": "better"}, weight="mean")),
    "rlr_parameter_noise": lambda: RLRRule(RLRRule.Settings(cover="zo", pairs=8)),
    "rlr_blocks_by_norms": lambda: RLRRule(RLRRule.Settings(span=1, cover="is", start="norms")),
    "draft_lv": lambda: TBP(TBP.Settings(variants=2)),
    "refl": lambda: TBP(TBP.Settings(judged=(2, 3), objective="hinge", target=5.0)),
    "flow_bp_sparse": lambda: TBP(TBP.Settings(connect="sparse", depth="all", trained=2, rescale=0.5, noise=True)),
    "flow_bp_bridge": lambda: TBP(TBP.Settings(connect="bridge", depth="all", trained=3)),
    "flow_bp_lagrange": lambda: TBP(TBP.Settings(connect="lagrange", depth="all", order=2)),
    "srpo": lambda: TBP(TBP.Settings(connect="known_noise", judged=(1, 3))),
    "drtune": lambda: TBP(TBP.Settings(depth="all", detached=True, trained=2, judged=(3, 4))),
    "dgpo": lambda: AWM(AWM.Settings(implicit="group", implicit_beta=10.0)),
    "residual": lambda: AWM(AWM.Settings(implicit="residual", implicit_to="anchor")),
    "listwise": lambda: AWM(AWM.Settings(implicit="listwise", shared_noise=True)),
    "vgrpo": lambda: AWM(
        AWM.Settings(
            weight="adaptive",
            ratio_over="sample",
            inner_updates=2,
            clip=0.1,
            anchor=0.0,
            spread="strata",
            shared_noise=True,
            times=2,
        )
    ),
    "strata": lambda: AWM(AWM.Settings(spread="strata", times=2)),
    "antithetic": lambda: NFT(NFT.Settings(spread="antithetic", times=1)),
    "flow_dppo": lambda: FlowGRPO(FlowGRPO.Settings(trust="kl", kl_limit=1e-3, inner_updates=2)),
    "last_step": lambda: GRPOGuard(GRPOGuard.Settings(last_step={"weight": 0.05, "ceiling": 0.6})),
    "flash_grpo": lambda: FlowGRPO(FlowGRPO.Settings(window_steps=1, window_by="prompt", step_weight="equal", kl=0.1)),
    "floors": lambda: FlowGRPO(FlowGRPO.Settings(floors={"toy": 5.0}, combine="normalised")),
    "floors_pathwise": lambda: TBP(TBP.Settings(floors={"toy": 5.0})),
    "anchored": lambda: AWM(AWM.Settings(data=ANCHOR)),
    "anchored_pathwise": lambda: TBP(TBP.Settings(data=ANCHOR)),
    "vader": lambda: TBP(TBP.Settings(frames="random")),
}
FACTORIES = {**RULES, **FORMS, **{f"small_{name}": make for name, make in SMALL.items()}}
every_rule = pytest.mark.parametrize("make", FACTORIES.values(), ids=FACTORIES.keys())
both_kinds = pytest.mark.parametrize("process", ["flow_sde", "ddim"])


def ready(rule: Rule, process: str = "flow_sde") -> ToyPolicy:
    policy = ToyPolicy(process=process)
    policy.add_shadows(rule.decays(0))
    return policy


@every_rule
def test_a_cache_of_features_is_for_rules_alone_whose_terms_are_of_finished_samples(make):
    entered = []

    class Caching(ToyPolicy):
        @contextmanager
        def cached(self):
            entered.append(True)
            yield

    rule, policy = make(), Caching()
    trainer = toy_trainer(rule, policy, groups=2, group_size=4)
    trainer.gradient(0)
    plan = rule.plan(policy.schedule, 0, np.random.default_rng(0))
    finished = all(term.through == "forward" for terms in plan.updates for term in terms)
    assert bool(entered) == (not rule.needs.exact_steps)
    assert finished or not entered


@every_rule
@both_kinds
def test_reward_goes_up(make, process):
    rule = make()
    policy = ready(rule, process)
    trainer = toy_trainer(rule, policy, groups=4, group_size=16, lr=0.03)
    given = toy_prompts(1, 500, seed=9)

    def mean() -> float:
        part = policy.rollout(given, Plan.deterministic(4))
        return float(toy_reward(policy.decode(part, part.x[-1]), given).mean())

    before = mean()
    for index in range(25):
        trainer.update(index)
    assert mean() > before + 0.05  # the weakest gains 0.12, and no rule moves it when its sign is wrong


@every_rule
@both_kinds
def test_micro_batches_add_up(make, process):
    given = toy_prompts(4, 6)
    whole, parts = (gradient(make(), ready(make(), process), given, micro_batch) for micro_batch in (24, 6))
    assert np.abs(whole).max() > 1e-6
    np.testing.assert_allclose(parts, whole, atol=1e-12)


@every_rule
def test_same_seed_same_numbers_other_seed_others(make):
    one, again = (gradient(make(), ready(make()), toy_prompts(2, 8)) for _ in range(2))
    other = gradient(make(), ready(make()), toy_prompts(2, 8, seed=1))
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other)


@every_rule
def test_state_round_trip_continues_as_if_never_stopped(make):
    def run(stop_at: int | None) -> np.ndarray:
        rule, policy = make(), ToyPolicy()
        trainer = toy_trainer(rule, policy)
        for index in range(4):
            if index == stop_at:
                state = json.loads(json.dumps(rule.state_dict()))
                kept = policy.delta.detach().clone(), policy.shadows, trainer.optimizer.state_dict()
                rule, policy = make(), ToyPolicy()
                trainer = toy_trainer(rule, policy)
                policy.delta.data.copy_(kept[0])
                policy.shadows = kept[1]
                trainer.optimizer.load_state_dict(kept[2])
                rule.load_state_dict(state)
            trainer.update(index)
        return policy.delta.detach().numpy()

    np.testing.assert_array_equal(run(None), run(2))


@pytest.mark.parametrize("name", RULES)
def test_every_rule_has_a_config_on_an_embedded_pipeline(name):
    assert any((ROOT / "configs" / name).glob("shapes-*.yaml"))


@every_rule
def test_a_rule_that_puts_noise_into_a_step_says_that_it_needs_a_sampler_with_noise(make):
    """So that a config with another one is refused before anything begins."""
    rule, policy = make(), ready(make())
    plans = [rule.plan(policy.schedule, update, np.random.default_rng(update)) for update in range(5)]
    assert rule.needs.stochastic_sampler or not any(any(plan.noise) for plan in plans)


@every_rule
def test_samples_without_a_score_carry_no_weight(make):
    """Whatever number stands where there is none."""
    rule, policy = make(), ready(make())
    plan, part, _ = rolled(rule, policy, 2, 6)
    count = len(part.tree.leaf_root)
    values = np.random.default_rng(0).normal(size=count)
    valid = np.arange(count) % 3 > 0
    found = []
    for stand_in in (0.0, 1e3):
        total = np.where(valid, values, stand_in)
        scores = Scores({"toy": np.where(valid, values, np.nan)}, total, valid, {"toy": 1.0})
        found.append(make().credit(part.tree, scores, toy_prompts(2, 6)))
    if found[0] is None:  # the reward's own gradient is what it learns from
        return
    for one, other in zip(*(credit.edges for credit in found), strict=True):
        np.testing.assert_array_equal(one, other)


# -- known gradients: full backpropagation on independent noise

BATCHES, SAMPLES = 60, 256


def batches(make, seed: int, policy_kwargs=None, size: int = 16) -> np.ndarray:
    """(BATCHES, parameters) independent gradients in groups of `size`, each with its update's own plan."""
    found = []
    for index in range(BATCHES):
        rule = make()
        policy = ToyPolicy(**(policy_kwargs or {}))
        with torch.no_grad():
            policy.delta.add_(0.1)  # not the reference, so that nothing vanishes by symmetry
        found.append(
            gradient(rule, policy, toy_prompts(SAMPLES // size, size, seed=seed, update=index), update=index).ravel()
        )
    return np.stack(found)


@pytest.fixture(scope="module")
def known() -> np.ndarray:
    return batches(lambda: FullTruncatedBP(4), seed=100)


def worst_z(found: np.ndarray, truth: np.ndarray) -> float:
    """Largest |z| over coordinates of the difference of two means."""
    error = np.sqrt(found.var(0, ddof=1) / len(found) + truth.var(0, ddof=1) / len(truth))
    return float(np.abs((found.mean(0) - truth.mean(0)) / error).max())


@pytest.mark.parametrize("make", [RLR, lambda: RLR(h=3), lambda: RLR(h=1)], ids=["rlr_h2", "rlr_h3", "rlr_h1"])
def test_unbiased_rules_agree_with_full_backpropagation(make, known):
    # 15 coordinates: |z| above 4.5 happens once in 10,000 fixed seeds by chance
    assert worst_z(batches(make, seed=200), known) < 4.5


def test_reinforce_is_unbiased_where_every_step_has_noise():
    truth = batches(lambda: FullTruncatedBP(4, noisy=4), seed=100)
    assert worst_z(batches(lambda: Reinforce(noisy=4), seed=200), truth) < 4.5


def test_invariant_7_noise_at_one_step_needs_the_span_that_leads_to_it():
    """Noise on step 2 alone: an h = 3 span with a pathwise last step is unbiased, a single-step score is not."""

    class OneNoise(RLR):
        def plan(self, schedule, update, rng):
            terms = (Term(3, 4, "reward"), Term(3 - self.h, 3, "log_prob"))
            return Plan(4, (False, False, True, False), (terms,))

    class OneNoiseBP(FullTruncatedBP):
        def plan(self, schedule, update, rng):
            return Plan(4, (False, False, True, False), ((Term(0, 4, "reward"),),))

    truth = batches(lambda: OneNoiseBP(4), seed=100)
    assert worst_z(batches(lambda: OneNoise(h=3), seed=200), truth) < 4.5
    assert worst_z(batches(lambda: OneNoise(h=1), seed=200), truth) > 4.5


@pytest.mark.parametrize(
    ("make", "least"),
    [(Reinforce, 4.5), (lambda: TruncatedBP(1), 20), (lambda: TruncatedBP(2), 20), (lambda: RLR(cover=False), 4.5)],
    ids=["reinforce_without_the_last_step", "truncated_1", "truncated_2", "rlr_without_the_rest"],
)
def test_biased_rules_do_not(make, least, known):
    assert worst_z(batches(make, seed=200), known) > least


def test_full_backpropagation_is_autograds():
    """K = T through the protocol equals autograd on the chain written out."""
    policy, given = ToyPolicy(), toy_prompts(2, 8)
    found = gradient(FullTruncatedBP(4), policy, given)
    rule = FullTruncatedBP(4)
    part = policy.rollout(given, rule.plan(policy.schedule, 0, np.random.default_rng(0)))
    delta = policy.delta.detach().clone().requires_grad_()
    x = part.x[0]
    for step in range(4):
        time = torch.full((len(x), 1), float(policy.schedule.sigma[step]), dtype=x.dtype)
        v = torch.cat([x, time, torch.ones_like(time)], 1) @ (policy.base + delta).T
        t, dt = policy.schedule.sigma[step], policy.schedule.sigma[step + 1] - policy.schedule.sigma[step]
        if part.eps[step] is None:
            x = x + v * dt
        else:
            g = 0.7 * np.sqrt(t / (1 - (policy.schedule.sigma[1] if t == 1 else t)))
            # x + v dt - g^2 score dt / 2 with score = -(x + (1 - t) v) / t
            x = x + v * dt + 0.5 * g**2 * (x + (1 - t) * v) / t * dt + g * np.sqrt(-dt) * part.eps[step]
    (-toy_reward(policy.decode(part, x), given).mean()).backward()
    np.testing.assert_allclose(found, delta.grad.numpy(), rtol=1e-10, atol=1e-14)
