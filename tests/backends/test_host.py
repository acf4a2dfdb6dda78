"""What the host does around the network: asked once, drawn once, read once."""

from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline
from torch.overrides import TorchFunctionMode

from diffalign.models import lora
from diffalign.rewards.scorer import Scorer
from diffalign.rules import RULES, FlowGRPO
from diffalign.training.scoring import Clock
from diffalign.training.trainer import Trainer
from diffalign.types import Plan
from tests.backends.test_both_pipelines import given, make, noisy
from tests.kit.helpers import shares_of

READS = {"item", "tolist", "numpy", "cpu", "__float__", "__bool__", "__int__", "__index__"}


class Reads(TorchFunctionMode):
    """Counts numbers that are read off tensors: on a device each waits for it."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += getattr(func, "__name__", "") in READS
        return func(*args, **(kwargs or {}))


def trainer(rule, policy, size=4):
    def reward(media, prompts):
        return media.pixels.flatten(1).mean(1)

    return Trainer(
        rule,
        policy,
        Scorer({"toy": reward}),
        torch.optim.AdamW(policy.parameters.values(), lr=1e-4),
        lambda update: given(size),
    )


def test_s1_a_pipeline_is_asked_for_its_device_once(monkeypatch):
    asked, own = [], DiffusionPipeline._execution_device
    monkeypatch.setattr(
        DiffusionPipeline, "_execution_device", property(lambda pipe: asked.append(1) or own.fget(pipe))
    )
    policy = make("shapes-sd3")
    part = policy.rollout(given(), noisy(4))
    policy.replay(part, 0, 4)
    policy.decode(part, part.x[-1])
    assert len(asked) == 1
    assert policy.pipe.device == torch.device("cpu") and type(policy.pipe) is type(policy.seam.pipe)


def test_a_pipeline_is_left_as_it_was():
    policy = make("shapes-sd3")
    kind = type(policy.pipe)
    with pytest.raises(RuntimeError, match="mine"):
        policy.drive(
            given(),
            policy.rollout(given(), noisy(4)).x[0],
            (0,),
            lambda *_: (_ for _ in ()).throw(RuntimeError("mine")),
        )
    assert type(policy.pipe) is kind and "prepare_latents" not in vars(policy.pipe)


def test_s2_numbers_are_read_once_a_step():
    """Twelve terms: three steps in four micro-batches."""
    policy = make("shapes-sd3")
    policy.micro_batch = 2
    made = trainer(FlowGRPO(FlowGRPO.Settings(kl=0.1)), policy)
    sampled = made._sample(0, Clock.of(policy))
    terms = sampled.rollout.plan.updates[0]
    assert len(terms) * len(sampled.rollout.prompts) / policy.micro_batch >= 12
    with Reads() as reads:
        made._gradient(shares_of(made, sampled), sampled, 0, 0)
    assert reads.count == 1


@pytest.mark.parametrize("name", ["shapes-sd3", "shapes-sd"])
def test_s4_a_start_is_drawn_once(name, monkeypatch):
    drawn, own = [], torch.randn

    def randn(*args, **kwargs):
        drawn.append(1)
        return own(*args, **kwargs)

    policy = make(name)
    policy.replay(policy.rollout(given(), noisy(4)), 0, 4)  # the forms of such calls are known from now on
    monkeypatch.setattr(torch, "randn", randn)
    part = policy.rollout(given(), noisy(4))
    assert len(drawn) == len(part.prompts)
    policy.replay(part, 0, 4)
    policy.decode(part, part.x[-1])
    assert len(drawn) == len(part.prompts)


def test_s7_a_call_does_not_visit_the_modules(monkeypatch):
    """A call's own cost at 4,000 modules more: visits of modules are counted, which is what took the time."""
    policy = make("shapes-sd3")
    part = policy.rollout(given(), noisy(4))
    visited, own = [], torch.nn.Module.named_modules

    def named_modules(module, *args, **kwargs):
        visited.append(module)
        return own(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "named_modules", named_modules)
    policy.rollout(given(), Plan(4, (True,) * 3 + (False,), ()))
    with policy.reference():
        policy.replay(part, 0, 4)
    assert visited == []


def test_the_reference_leaves_what_is_trained_as_it_is():
    policy = make("shapes-sd3")
    flags = [p.requires_grad for p in policy.parameters.values()]
    with pytest.raises(ZeroDivisionError), policy.reference():
        raise ZeroDivisionError
    assert flags == [p.requires_grad for p in policy.parameters.values()]
    assert not any(layer.disable_adapters for layer in lora.layers(policy.pipe))


RULES_READ = {
    "flow_grpo": {"window": [0, 2]},
    "grpo_guard": {"window": [1, 3]},
    "branch_grpo": {},
    "truncated_bp": {"depth": 1},
    "awm": {},
}


@pytest.mark.parametrize("name", RULES_READ)
def test_m21_a_rollout_keeps_what_is_read(name):
    """Each latent, noise and mean that is kept is spoilt in turn: the gradient is another one, so it was read."""
    kind, policy = RULES[name], make("shapes-sd3")
    settings = {key: value for key, value in RULES_READ[name].items() if key in kind.Settings.model_fields}
    policy.micro_batch = 4
    made = trainer(kind(kind.Settings(**settings)), policy)
    sampled = made._sample(0, Clock.of(policy))

    def gradient(rollout):
        parts = [replace(sampled.parts[0], rollout=rollout)]
        made._gradient(shares_of(made, sampled), replace(sampled, parts=parts), 0, 1)
        return torch.cat([p.grad.flatten() for p in policy.parameters.values() if p.grad is not None])

    expected = gradient(sampled.rollout)
    kept, read = 0, 0
    for column in ("x", "eps", "mean"):
        values = getattr(sampled.rollout, column)
        for place, value in enumerate(values):
            if value is None or not value.numel():
                continue
            kept += value.nbytes
            spoilt = replace(sampled.rollout, **{column: [*values[:place], value + 0.1, *values[place + 1 :]]})
            decoded = column == "x" and place == len(values) - 1
            read += value.nbytes * (decoded or not torch.equal(gradient(spoilt), expected))
    assert kept <= 1.2 * read
