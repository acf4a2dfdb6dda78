"""Running out of memory: the micro-batch is halved, old log-probs are computed again, and the update is the one it would have been."""

import numpy as np
import pytest
import torch

from diffalign.backends.toy import ToyPolicy
from diffalign.errors import Fault
from diffalign.rewards.scorer import Scorer
from diffalign.rules import AWM, DDPO, NFT, BranchGRPO, FlowGRPO
from diffalign.runtime.memory import out_of_memory
from diffalign.training.scoring import Clock
from tests.kit.helpers import gradient, shares_of, toy_prompts, toy_trainer

CPU_MESSAGE = (
    "[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
)


class Cramped(ToyPolicy):
    """A toy whose network takes `room` rows at a time, and remembers the sizes it was asked for with gradient."""

    def __init__(self, room: int, error: Exception | None = None, only_with_gradient: bool = False, **kwargs) -> None:
        super().__init__(**kwargs)
        self.room, self.only_with_gradient = room, only_with_gradient
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def network(self, x, time):
        if len(x) > self.room and (torch.is_grad_enabled() or not self.only_with_gradient):
            raise self.error
        return super().network(x, time)


def trained(policy, rule, micro_batch=32, updates=2):
    said: list[str] = []
    trainer = toy_trainer(rule, policy, 4, 8, micro_batch=micro_batch)
    trainer.notify = said.append
    metrics = [trainer.update(index).metrics for index in range(updates)]
    return policy.delta.detach().numpy(), said, trainer, metrics


@pytest.mark.parametrize("error", [None, RuntimeError(CPU_MESSAGE), MemoryError()])
@pytest.mark.parametrize("only_with_gradient", [False, True])
@pytest.mark.parametrize("make", [FlowGRPO, DDPO])
def test_a_smaller_micro_batch_gives_the_same_updates(make, only_with_gradient, error):
    expected, silent, _, _ = trained(ToyPolicy(), make())
    policy = Cramped(9, error, only_with_gradient)
    found, said, trainer, _ = trained(policy, make())
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert not silent
    assert trainer.policy.micro_batch == policy.micro_batch == 8
    halvings = [line for line in said if "out of memory" in line]
    assert [line.split()[-1] for line in halvings] == ["16", "8"]
    # What was sampled in larger pieces has its log-probs computed again, and only then.
    assert sum("computed again" in line for line in said) == (1 if only_with_gradient else 0) + only_with_gradient


def test_recomputed_log_probs_hold_the_first_ratio_at_one_when_pieces_round_differently():
    """A network whose rounding depends on the number of rows: without new log-probs the run would stop."""

    class Uneven(Cramped):
        def network(self, x, time):
            return super().network(x, time) * (1 + 1e-7 * len(x))

    _, said, _, metrics = trained(Uneven(9, only_with_gradient=True), FlowGRPO(), updates=1)
    assert metrics[0]["ratio"] == 1.0
    assert any("computed again" in line for line in said)


def test_rule_state_is_counted_once():
    rule = DDPO()
    trained(Cramped(9, only_with_gradient=True), rule, updates=1)
    assert len(rule.rewards["total"]["a"]) == 32


def test_one_sample_too_many_is_a_fault_with_the_way_out():
    with pytest.raises(Fault, match="out of memory with one sample at a time .* memory.checkpoint: both"):
        trained(Cramped(0), FlowGRPO())


def test_other_errors_are_not_taken_for_memory():
    with pytest.raises(RuntimeError, match="shapes differ"):
        trained(Cramped(0, RuntimeError("shapes differ")), FlowGRPO())
    assert not out_of_memory(RuntimeError("cannot reshape tensor"))


@pytest.mark.parametrize(("clip", "share"), [(1e-4, 0.2), (2e-6, 0.2), (2e-6, 3.0)])
def test_off_the_cpu_a_first_pass_may_be_off_by_a_tenth_of_the_clip_range(clip, share):
    """Half the rows would be clipped on the first pass where a rule with a clip range of 2e-6 may miss by 1e-4."""
    policy, rule = ToyPolicy(), FlowGRPO(FlowGRPO.Settings(clip=clip))
    type(policy).exact = property(lambda self: False)
    try:
        trainer = toy_trainer(rule, policy, 2, 8)
        sampled = trainer._sample(0, Clock(torch.device("cpu")))
        for log_prob in sampled.rollout.log_prob[:-1]:
            log_prob += share * clip  # what kernels that do not repeat their bits would do
        shares = shares_of(trainer, sampled)
        with pytest.raises(Fault, match=rf"allowed {0.1 * clip:g}\): sampling and training"):
            trainer.backward.accumulate(shares, first=True, where="update 1")
        for log_prob in sampled.rollout.log_prob[:-1]:
            log_prob -= (share - 0.05) * clip
        trainer.backward.accumulate(shares, first=True, where="update 1")
    finally:
        del type(policy).exact


@pytest.mark.parametrize(
    ("rule", "learns"),
    [
        (FlowGRPO(), False),
        (FlowGRPO(FlowGRPO.Settings(kl=0.5)), True),
        (BranchGRPO(BranchGRPO.Settings(splits=[0], kl=0.5)), True),
        (AWM(), True),
        (AWM(AWM.Settings(anchor=0.0)), False),
        (NFT(), True),
    ],
    ids=["flow_grpo", "flow_grpo_kl", "branch_grpo_kl", "awm", "awm_free", "nft"],
)
def test_equal_rewards_skip_an_update_unless_something_else_is_to_be_learnt(rule, learns):
    """A divergence or an anchor pulls whatever the rewards are."""
    policy = ToyPolicy()
    trainer = toy_trainer(rule, policy, 2, 4)
    with torch.no_grad():
        policy.delta.add_(0.1)  # away from the base model, and from every slow copy
    trainer.scorer = trainer.sampling.scorer = trainer.backward.scorer = Scorer(
        {"equal": lambda media, prompts: [1.0] * len(prompts)}
    )
    before = policy.delta.detach().clone()
    update = trainer.update(0)
    assert update.flat is not learns
    assert torch.equal(policy.delta, before) is not learns


@pytest.mark.parametrize("limit", [1.0, 5.0])
def test_at_the_old_policy_nfts_gradient_is_the_limit_times_awms(limit):
    shared = {"times": 2, "advantage_limit": limit, "kl": 0.0}
    nft = NFT(NFT.Settings(space="prediction", beta=0.3, **shared))
    awm = AWM(AWM.Settings(weight="uniform", anchor=0.0, **shared))
    grads = []
    for rule in (nft, awm):
        policy = ToyPolicy()
        policy.add_shadows(rule.decays(0))
        grads.append(gradient(rule, policy, toy_prompts(3, 6)))
    np.testing.assert_allclose(grads[0], limit * grads[1], rtol=1e-9, atol=1e-13)
