"""`rule.data`: every optimiser step also learns the matching loss on samples of the bare base model, drawn once."""

import copy

import numpy as np
import pytest
import torch

from diffalign import config
from diffalign.backends.toy import ToyPolicy, toy_reward
from diffalign.config.limits import GuardConfig
from diffalign.errors import UserError
from diffalign.planning import cost
from diffalign.rewards.scorer import Scorer
from diffalign.rules import AWM, FlowGRPO
from diffalign.runs.guards import alarms
from diffalign.runtime import keys
from diffalign.runtime.randomness import Purpose, numpy_generator
from diffalign.types import Credit, Plan
from tests.kit.helpers import toy_trainer

DATA = {"count": 16, "rows": 8, "times": 2, "weight": 0.5}
KINDS = ("flow_sde", "ddim")
both_kinds = pytest.mark.parametrize("process", KINDS)


def made(process="flow_sde", data=DATA, rule=AWM, **settings):
    policy = ToyPolicy(process=process)
    return policy, toy_trainer(rule(rule.Settings(data=data, **settings)), policy, groups=2, group_size=4)


def moved(policy, size=0.3):
    """Away from the base model, so that its samples are no longer the policy's."""
    policy.delta.data += size * torch.from_numpy(np.random.default_rng(3).normal(size=policy.delta.shape))


@both_kinds
def test_17_without_it_an_update_is_what_it_was_and_with_it_another(process):
    (one, plain), (two, anchored) = made(process, None), made(process)
    plain.update(0), anchored.update(0)
    assert not np.allclose(one.delta.detach(), two.delta.detach(), atol=1e-4)
    assert keys.DATA not in plain.update(1).metrics
    assert {keys.DATA, keys.DATA_BASE} <= anchored.update(1).metrics.keys()


@both_kinds
def test_18_its_gradient_is_that_of_matching_with_unit_advantages(process):
    """Against AWM's own loss with A = 1 and no growth function, on the base model's samples drawn by hand."""
    policy, trainer = made(process)
    moved(policy)
    with_it = _gradient(policy, trainer)
    policy.rows_forward = 0
    trainer.anchor, anchor = None, trainer.anchor
    without = _gradient(policy, trainer)
    base, given = ToyPolicy(process=process), anchor._samples.prompts
    samples = base.rollout(given, Plan.deterministic(4))
    np.testing.assert_array_equal(anchor._samples.x[-1], samples.x[-1])
    # Which are picked, and at which levels, is asked; what is learnt of them is not.

    rng = numpy_generator(0, Purpose.ANCHOR, 0, 0)
    part = samples.select(rng.choice(16, 8, replace=False))
    plan = anchor.rule.plan(policy.schedule, 0, rng)
    rule, ones = AWM(AWM.Settings(weight="uniform", anchor=0.0)), Credit([np.ones(8)] * 4)
    policy.delta.grad = None
    assert sum(term.weight for term in plan.updates[0]) == pytest.approx(0.5)
    for term in plan.updates[0]:
        (term.weight * rule.loss(term, policy, part, ones, None).value).backward()
    np.testing.assert_allclose(with_it - without, policy.delta.grad.numpy(), rtol=1e-9, atol=1e-12)


def _gradient(policy, trainer):
    trainer.gradient(0)
    return policy.delta.grad.numpy().copy()


@both_kinds
def test_19_samples_are_the_bare_base_models_whenever_they_are_drawn(process):
    (_, first), (late, resumed) = made(process), made(process)
    first.prepare()
    moved(late)
    resumed.prepare()
    np.testing.assert_array_equal(first.anchor._samples.x[-1], resumed.anchor._samples.x[-1])
    kept = first.anchor._samples.x[-1].clone()
    for index in range(5):
        first.update(index)
    np.testing.assert_array_equal(first.anchor._samples.x[-1], kept)
    assert not (kept == 0).all()


def test_19_a_resumed_run_learns_and_counts_the_same():
    (whole_policy, whole), (policy, part) = made(), made()
    rows = [whole.update(k).metrics for k in range(4)]
    part.update(0), part.update(1)
    state, delta, shadows = copy.deepcopy(part.optimizer.state_dict()), policy.delta.detach().clone(), policy.shadows
    again_policy, again = made()
    again_policy.delta.data.copy_(delta)
    again_policy.shadows = shadows
    again.optimizer.load_state_dict(state)
    found = [again.update(k).metrics for k in (2, 3)]
    for one, other in zip(rows[2:], found, strict=True):
        for name in ("nfe", "nfe_backward", keys.DATA, keys.DATA_BASE):
            assert one[name] == other[name]
    np.testing.assert_array_equal(whole_policy.delta.detach(), again_policy.delta.detach())


def test_drawing_counts_for_the_first_update():
    _, trainer = made(weight="uniform", anchor=0.0)
    first, second = (trainer.update(k).metrics["nfe"] for k in (0, 1))
    assert first - second == DATA["count"] * 4  # steps of the chain


def test_the_base_models_loss_is_of_the_same_noise():
    policy, trainer = made()
    at_first = trainer.update(0).metrics
    assert at_first[keys.DATA] == at_first[keys.DATA_BASE]
    moved(policy)
    later = trainer.update(1).metrics
    assert later[keys.DATA] > 1.2 * later[keys.DATA_BASE]


def test_every_step_takes_others_at_other_levels():
    policy, trainer = made(inner_updates=2)
    seen = []
    loss = trainer.anchor.rule.loss
    trainer.anchor.rule.loss = lambda term, policy, part, *rest: (
        seen.append((term.start, term.draw, *part.prompts.seed)) or loss(term, policy, part, *rest)
    )
    trainer.update(0), trainer.update(1)
    assert len(seen) == len(set(seen)) == 2 * 2 * 2  # updates, steps, levels
    assert len({tuple(seeds) for _, _, *seeds in seen}) == 4


def test_20_its_alarm_is_the_base_models_samples_denoised_worse_than_by_it():
    def rows(of):
        return [{"update": k + 1.0, keys.DATA: of(k), keys.DATA_BASE: 1.0 + k % 2} for k in range(20)]

    settings = GuardConfig()
    assert not alarms(rows(lambda k: 1.05 * (1.0 + k % 2)), ["r"], settings)
    (alarm,) = alarms(rows(lambda k: (1.0 + k % 2) * (1.0 if k < 10 else 1.3)), ["r"], settings)
    assert alarm.name == "estranged"
    assert 10 < alarm.update <= 15
    assert "rule.data.weight" in alarm.line


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("rule.data={rows: 300}", "rule.data.rows: got 300, allowed is up to rule.data.count (256)"),
        ("rule.data={times: 10}", "rule.data.times: got 10, allowed is up to the noise levels (9)"),
        ("rule.data={weight: 0}", "rule.data.weight: got 0"),
        ("rule.data={folder: x}", "rule.data.folder"),
        ("rule.data=yes", "rule.data"),
    ],
)
def test_what_it_refuses(setting, said):
    with pytest.raises(UserError) as caught:
        config.load("awm/shapes-sd3", [setting])
    assert said in "\n".join(caught.value.problems)


def test_where_rewards_are_equal_the_anchor_alone_is_learnt():
    policy, trainer = made(rule=FlowGRPO)
    trainer.scorer = trainer.sampling.scorer = trainer.backward.scorer = Scorer({"same": lambda m, p: [1.0] * len(p)})
    moved(policy)
    before = policy.delta.detach().clone()
    update = trainer.update(0)
    assert not update.flat and keys.DATA in update.metrics
    assert not torch.equal(policy.delta.detach(), before)


def test_a_plan_says_what_drawing_takes():
    found = cost.count(config.load("awm/shapes-sd3", ["rule.data={count: 60}"]))
    plain = cost.count(config.load("awm/shapes-sd3"))
    (line,) = [note for note in found.notes if note.startswith("rule.data: ")]
    assert line.startswith("rule.data: 60 samples of the base model, 600 rows, are drawn in the first update")
    assert found.rows_forward - plain.rows_forward == 2 * 32  # the trained network and the base model, a level


def test_scores_do_not_pay_for_it():
    """No reward is asked about the base model's samples."""
    asked = []

    def counting(media, prompts):
        asked.append(len(prompts))
        return toy_reward(media, prompts)

    policy, trainer = made()
    trainer.scorer = trainer.sampling.scorer = Scorer({"toy": counting})
    trainer.update(0)
    assert sum(asked) == 8
