"""Running out of memory: the micro-batch is halved, old log-probs are computed again, and the update is the one it would have been."""

import numpy as np
import pytest
import torch

from diffalign.backends.toy import ToyPolicy
from diffalign.errors import Fault
from diffalign.rules import DDPO, FlowGRPO
from diffalign.runtime.memory import out_of_memory
from tests.kit.helpers import toy_trainer

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
    with pytest.raises(Fault, match="out of memory with one sample at a time .* optimizer.gradient_checkpointing"):
        trained(Cramped(0), FlowGRPO())


def test_other_errors_are_not_taken_for_memory():
    with pytest.raises(RuntimeError, match="shapes differ"):
        trained(Cramped(0, RuntimeError("shapes differ")), FlowGRPO())
    assert not out_of_memory(RuntimeError("cannot reshape tensor"))
