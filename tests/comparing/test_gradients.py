"""`diffalign gradients`: what it says of rules whose answers are known."""

import json

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from diffalign.backends.toy import ToyPolicy, toy_reward
from diffalign.cli import main
from diffalign.comparing.gradients import instrument as gradients
from diffalign.comparing.gradients.laboratory import FullBackpropagation, Laboratory
from diffalign.errors import UserError
from diffalign.runtime import memory
from tests.kit.helpers import gradient, toy_prompts

TBP = "truncated_bp/shapes-sd3@objective=linear@target=null@noise=true"
BASE = (
    "sampler.process=flow_sde",
    "sampler.steps=4",
    "prompts.group_size=8",
    "prompts.groups=8",
    "optimizer.micro_batch=64",
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The Gaussian chain, 4 steps."""
    names = (
        *(f"{TBP}@depth={k}" for k in (1, 2, 3, 4)),
        "rlr/shapes-sd3@depth=1@span=2",
        "rlr/shapes-sd3@depth=2@span=1",
        "rlr/shapes-sd3@depth=0@span=1@noise=[0,1,2,3]",
        "rlr/shapes-sd3@depth=1@span=1@cover=none",
    )
    out = tmp_path_factory.mktemp("lab") / "out"
    specs = gradients.specifications([*names, *BASE])
    return gradients.run(specs, out, 48, chain=True, say=lambda line: None), out


def test_truncated_bp_is_biased_by_what_it_cuts_and_not_at_full_depth(found):
    one, two, three, four = found[0][:4]
    assert one.bias_low > two.bias_high > two.bias_low > three.bias_high > three.bias_low > 0.1
    assert (four.bias, four.bias_low, four.bias_high) == (0, 0, 0)
    assert four.cosine == pytest.approx(1)


def test_rlr_is_not_resolved_from_unbiased_and_without_the_rest_it_is_biased(found):
    paper, deeper, reinforce, rest = found[0][4:]
    for item in (paper, deeper, reinforce):
        assert item.bias_low <= 0 <= item.bias_high < 0.2
    assert rest.bias_low > 0.2


def test_invariant_6_in_the_instrument(found):
    deeper, reinforce = found[0][5:7]
    assert reinforce.variance > 1.3 * deeper.variance
    assert deeper.signal_to_noise > 1.3 * reinforce.signal_to_noise


def test_costs_are_counted(found):
    one, four, deeper = found[0][0], found[0][3], found[0][5]
    assert (one.rows_forward, one.rows_backward) == (64 * 4, 64)
    assert (four.rows_forward, four.rows_backward) == (64 * 4, 64 * 4)
    assert (deeper.rows_forward, deeper.rows_backward) == (64 * 8, 64 * 4)
    # On a chain of fifteen numbers temporaries outweigh graphs; that memory grows with the depth is held on the pipelines.
    assert min(item.peak_bytes for item in (one, four, deeper)) > 0
    assert deeper.term_norm[0] is not None
    assert one.term_norm[0] is None


def test_the_steps_parts_are_those_of_the_exact_gradient(found):
    """Against autograd with a copy of the parameters of its own for every step."""
    laboratory = Laboratory(
        gradients.specifications((f"{TBP}@depth=1", *BASE))[
            next(iter(gradients.specifications((f"{TBP}@depth=1", *BASE))))
        ],
        4,
        chain=True,
    )
    policy, noise = laboratory.policy, (True, True, True, False)
    sums = np.zeros((4, 15))
    squares = np.zeros(4)
    for index in range(6):
        part = policy.rollout(laboratory._batch(index), FullBackpropagation(noise).plan(policy.schedule, 0, None))
        part = policy.rollout(part.prompts, part.plan)
        deltas = [policy.delta.detach().clone().requires_grad_() for _ in range(4)]
        x = part.x[0]
        for k in range(4):
            time = torch.full((len(x), 1), float(policy.schedule.sigma[k]), dtype=torch.float64)
            network = torch.cat([x, time, torch.ones_like(time)], 1) @ (policy.base + deltas[k]).T
            table = policy.noisy if noise[k] else policy.quiet
            x = float(table.x[k]) * x + float(table.prediction[k]) * network
            if noise[k]:
                x = x + float(table.std[k]) * policy._noise(part.prompts, part.plan, k, like=x)
        (-toy_reward(policy.pixels(part.prompts, x), part.prompts).mean()).backward()
        grads = np.stack([delta.grad.numpy().ravel() for delta in deltas])
        sums += grads
        squares += (grads**2).sum(1)
    expected = np.sqrt(((sums**2).sum(1) - squares) / (6 * 5))
    np.testing.assert_allclose(laboratory.contributions(noise, 6), expected, rtol=1e-9)


def test_what_is_written(found):
    rules, out = found
    data = json.loads((out / gradients.RESULTS).read_text())
    assert [rule["label"] for rule in data["rules"]] == [item.label for item in rules]
    assert len(data["contributions"]) == 4
    assert data["batches"] == 48
    assert (out / "gradients.png").stat().st_size > 20_000
    with pytest.raises(UserError, match="holds results already"):
        gradients.run({}, out, 4, chain=True, say=print)


def test_labels_say_what_differs(found):
    labels = [item.label for item in found[0]]
    assert labels[0] == "truncated_bp depth=1 noise=true"
    assert labels[4] == 'rlr depth=1 span=2 cover="lr" noise=null'


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["rlr/shapes-sd3@depth=11"], "rule.depth: got 11"),
        (["rlr/shapes-sd3@depht=1"], "rule.depht: unknown key; did you mean depth?"),
        (
            ["rlr/shapes-sd3", "flow_grpo/shapes-sd@3"],
            "flow_grpo/shapes-sd@3: config: no file 'flow_grpo/shapes-sd@3'; did you mean flow_grpo/shapes-sd3?",
        ),
        (["flow_grpo/shapes-sd3"], "full backpropagation needs differentiable ones, got shapes_geneval_partial"),
        (["seed=3"], "gradients: no CONFIG given, only overrides"),
    ],
)
def test_bad_input_is_named(arguments, expected, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["gradients", *arguments, "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_on_an_embedded_pipeline(tmp_path, capsys):
    few = (
        "sampler.process=flow_sde",
        "sampler.steps=3",
        "prompts.groups=2",
        "prompts.group_size=4",
        "optimizer.micro_batch=8",
    )
    words = (f"{TBP}@depth=3", "rlr/shapes-sd3@depth=1@span=1", *few, "--out", str(tmp_path), "--batches", "6")
    with pytest.raises(SystemExit) as stop:
        main(["gradients", *words])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "truncated_bp depth=3 noise=true" in shown
    rules = json.loads((tmp_path / gradients.RESULTS).read_text())["rules"]
    assert rules[0]["bias"] == 0


# -- counting what is allocated


def test_allocated_bytes_are_counted_once_and_what_runs_again_is():
    weight = torch.nn.Parameter(torch.ones(1000, dtype=torch.float32))
    x = torch.ones(500, requires_grad=True)
    with memory.Live() as live:
        view = weight.view(10, 100).t()  # what was there is no cost
        y = (x * 2).exp()  # 2,000 bytes, after 4,000 at once
        assert (live.now, live.peak) == (2000, 4000)
        z = y.view(5, 100)[1:]
        assert live.now == 2000
        del y, z
        assert live.now == 0
    assert view.shape == (100, 10)

    def many(x):
        for _ in range(10):
            x = (x * 1.5).sin()
        return x

    x = torch.ones(100_000, requires_grad=True)
    x.grad = torch.zeros_like(x)
    plain = memory.peak_bytes(lambda: many(x).sum().backward())
    again = memory.peak_bytes(lambda: checkpoint(many, x, use_reentrant=False).sum().backward())
    assert plain > 10 * x.nbytes
    assert again > 0.9 * plain  # saved-tensor hooks would say: nothing


def test_full_backpropagation_is_the_exact_gradient():
    from tests.rules.small_rules import FullTruncatedBP

    given = toy_prompts(2, 8)
    one = gradient(FullBackpropagation((True, True, True, False)), ToyPolicy(), given)
    np.testing.assert_array_equal(one, gradient(FullTruncatedBP(4), ToyPolicy(), given))


def test_the_same_gradient_is_not_measured_twice():
    from diffalign.comparing.gradients.instrument import specifications

    with pytest.raises(UserError, match="rlr/shapes-sd3: given twice"):
        specifications(("rlr/shapes-sd3", "rlr/shapes-sd3"))
    with pytest.raises(UserError, match="given twice"):
        specifications(("rlr/shapes-sd3@depth=2", "rlr/shapes-sd3"))
