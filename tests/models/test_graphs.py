"""Recorded calls give the bits of calls that run kernel by kernel. Without a card what records is a stand-in that does the work again and
insists on parameters being where they were."""

import functools

import pytest
import torch

from diffalign.backends.diffusers import DiffusersPolicy
from diffalign.errors import Fault
from diffalign.models import graphs, loading, lora
from diffalign.models.calls import GIVEN
from diffalign.models.graphs import Graphs
from diffalign.models.recordings import Tools
from diffalign.processes import PROCESSES
from diffalign.prompts import book
from diffalign.runtime.memory import fitting
from diffalign.shapes import models
from diffalign.types import Plan

CARD = pytest.param("cuda", marks=pytest.mark.gpu)
PLACES = pytest.mark.parametrize("device", ["cpu", CARD])
MODELS = ["shapes-sd3", "shapes-sd", "shapes-flux", "shapes-wan"]
NOISY = Plan(4, (True, True, True, False), ())


def given(texts=("two stars", "a red circle"), size=2):
    return book.draw([{"prompt": text} for text in texts], len(texts), size, 0, 0)


def again(parameters):
    """A recorder without a card."""

    def record(work):
        work()
        places = [p.data_ptr() for p in parameters.values()]

        def replay():
            assert places == [p.data_ptr() for p in parameters.values()], "a recording reads what is no longer there"
            work()

        return replay

    return lambda: record


def made(name, device, recorded, guidance=1.0, checkpoint="none", dtype=torch.float32):
    pipe, _ = loading.load(name, dtype, device)
    parameters = lora.attach(pipe, 4, 8, None, 0)
    for index, p in enumerate(parameters.values()):
        p.data.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(index)) * 0.05)
    tools = Tools() if device == "cuda" else Tools(again(parameters), lambda work: work(), "cpu")
    call = {k: v for k, v in models.call(name).items() if k not in GIVEN}
    kind = "ddim" if name == "shapes-sd" else "flow_sde"
    return DiffusersPolicy(
        pipe,
        PROCESSES[kind],
        steps=4,
        noise_level=0.7,
        guidance_scale=guidance,
        call=call,
        micro_batch=2,
        parameters=parameters,
        checkpoint=checkpoint,
        recorder=tools if recorded else None,
    )


def step(policy, part, k):
    """A term's value and gradient, and a step of the parameters in its direction."""
    for p in policy.parameters.values():
        p.grad = None
    now = policy.transition(part, k)
    now.mean.square().mean().backward()
    found = [p.grad.clone() for p in policy.parameters.values() if p.grad is not None]
    with torch.no_grad():
        for p in policy.parameters.values():
            if p.grad is not None:
                p.sub_(0.1 * p.grad)
    return [now.mean.detach().clone(), *found]


def history(policy, prompts=None):
    """Numbers of everything that a rule may ask for, in an order in which the parameters move in between."""
    prompts = given() if prompts is None else prompts
    policy.add_shadows(["slow"])
    found = []
    for _ in range(3):
        part = policy.rollout(prompts, NOISY)
        found += [x for x in part.x if x.numel()]
        found += [x for k in (0, 1, 2) for x in step(policy, part.select([0, 1]), k)]
        time = torch.full((4,), 0.5)
        with torch.no_grad(), policy.reference():
            found.append(policy.predict(part, part.x[0], time))
        with policy.shadow("slow"):
            found.append(policy.predict(part, part.x[0], time))
        with policy.shifted(0, [1], 0.1):
            found.append(policy.rollout(prompts, NOISY).x[-1])
        policy.follow({"slow": 0.5})
    return found


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def repeatable():
    """Attention whose gradient adds in one order, or two eager runs would differ."""
    was = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True  # convolutions' too
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield
    torch.backends.cudnn.deterministic = was


@PLACES
@pytest.mark.parametrize("checkpoint", ["none", "blocks"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", MODELS)
def test_c6_recorded_calls_give_the_bits_of_eager_ones(name, guidance, checkpoint, device, repeatable):
    eager = history(made(name, device, False, guidance, checkpoint))
    policy = made(name, device, True, guidance, checkpoint)
    assert same(history(policy), eager)
    assert not policy.remarks
    assert sum(g.recorded for g in policy.graphs) >= 3  # with gradient, without, without adapters


@PLACES
def test_c2_a_replay_gives_the_log_probs_of_the_rollout(device):
    for name in MODELS:
        policy = made(name, device, True, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
        from diffalign.ops import gaussian

        for _ in range(2):
            part = policy.rollout(given(), NOISY).select([0, 1])
            for k in (0, 1, 2):
                now = policy.transition(part, k)
                assert torch.equal(gaussian.log_prob(part.x[k + 1], now.mean, now.std, reduce="mean"), part.log_prob[k])
                now.mean.sum().backward()


@PLACES
def test_c6_shapes_in_turn_have_recordings_of_their_own(device, repeatable):
    def run(recorded):
        policy = made("shapes-sd3", device, recorded)
        found = []
        for rows in (2, 1, 2, 1, 2, 1):
            policy.micro_batch = rows
            part = policy.rollout(given(size=1), NOISY)
            found += [x for x in part.x if x.numel()] + step(policy, part.select(range(rows)), 1)
        return found

    assert same(run(True), run(False))


@PLACES
def test_calls_whose_gradients_are_still_to_come_do_not_disturb_one_another(device, repeatable):
    """Of four steps' terms at once, two fit recordings, and the others run eagerly."""

    def run(recorded):
        policy = made("shapes-sd3", device, recorded)
        part = policy.rollout(given(size=1), NOISY)
        for _ in range(3):
            sum(policy.transition(part, k).mean.square().mean() for k in range(4)).backward()
        return [p.grad for p in policy.parameters.values() if p.grad is not None]

    found, expected = run(True), run(False)
    assert same(found, expected)


@PLACES
def test_a_gradient_through_the_latents_arrives(device, repeatable):
    def run(recorded):
        policy = made("shapes-sd3", device, recorded)
        part = policy.rollout(given(size=1), NOISY)
        for _ in range(3):
            policy.replay(part, 2, 4).x.square().mean().backward()
        return [p.grad for p in policy.parameters.values() if p.grad is not None]

    assert same(run(True), run(False))


class Odd(torch.nn.Module):
    """It reads a number off a tensor, which a recording cannot."""

    def __init__(self, device):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3, device=device))

    def forward(self, x):
        return x * self.weight if x.sum().item() > 0 else x


def refusing(work):
    raise RuntimeError("operation not permitted when stream is capturing")


@PLACES
def test_c7_what_cannot_be_recorded_runs_as_it_would_and_that_is_said_once(device):
    said = []
    tools = Tools() if device == "cuda" else Tools(lambda: refusing, lambda work: work(), "cpu")
    odd = Odd(device)
    call = Graphs("transformer", odd, odd.forward, [odd.weight], lambda: None, said.append, tools=tools)
    x = torch.ones(2, 3, device=device)
    for _ in range(4):
        out = call(x)
        assert torch.equal(out, x)
        out.sum().backward()
    assert len(said) == 1
    assert said[0].startswith("speed: calls of the transformer cannot be recorded (")
    assert call.recorded == 0


class Product(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(3))

    def forward(self, x):
        return (x @ self.weight,)


def linear(tools, said):
    net = Product()
    return Graphs("net", net, net.forward, [net.weight], lambda: None, said.append, tools=tools)


def plain_tools():
    def record(work):
        work()
        return work

    return Tools(lambda: record, lambda work: work(), "cpu")


def test_a_gradient_is_taken_once():
    call = linear(plain_tools(), [])
    x = torch.ones(2, 3)
    call(x)
    out = call(x)[0].sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be taken once"):
        out.backward()


def leaves(out):
    """The leaves in the graph of a gradient."""
    seen, todo = set(), [out.grad_fn]
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += [after for after, _ in node.next_functions if after is not None]
    return [node.variable for node in seen if hasattr(node, "variable")]


@pytest.mark.parametrize("checkpoint", ["none", "blocks"])
def test_a_recording_has_leaves_of_its_own_of_the_same_memory(checkpoint):
    """Those of the network belong to another stream as long as a call before has its gradient to come: guidance's first one."""
    policy = made("shapes-wan", "cpu", True, guidance=3.0, checkpoint=checkpoint)
    part = policy.rollout(given(), NOISY).select([0, 1])
    for _ in range(2):
        policy.transition(part, 1).mean.sum().backward()
    (network,) = policy.graphs
    calls = [call for pair in network.calls.values() for call in pair if call.parameters]
    assert calls
    for call in calls:
        own = {id(p) for p in call.own}
        met = [leaf for out in call._carrying for leaf in leaves(out) if isinstance(leaf, torch.nn.Parameter)]
        assert checkpoint == "blocks" or len(met) == len(own)  # what runs again hides them
        assert {id(leaf) for leaf in met} <= own
        assert [p.data_ptr() for p in call.own] == [p.data_ptr() for p in call.parameters]
    assert {index for *_, index in network.places.names} == set(range(len(network.parameters)))


def test_a_call_whose_gradient_nobody_takes_is_free_again():
    call = linear(plain_tools(), [])
    for _ in range(5):
        call(torch.ones(2, 3))
    assert call.recorded == 1


def test_ever_new_forms_end_the_recordings(monkeypatch):
    monkeypatch.setattr(graphs, "OFTEN", 5)
    said = []
    call = linear(plain_tools(), said)
    with torch.no_grad():
        for rows in range(1, 9):
            for _ in range(2):
                call(torch.ones(rows, 3))
    assert said == [
        "speed: calls of the net cannot be recorded (RuntimeError: they have had more than 5 forms), they run one kernel at a time"
    ]


def test_recordings_go_before_the_micro_batch_is_halved():
    policy = made("shapes-sd3", "cpu", True)
    history(policy)
    said, tries = [], []

    def work():
        tries.append((policy.micro_batch, sum(g.recorded for g in policy.graphs)))
        if len(tries) < 3:
            raise torch.OutOfMemoryError("no more")
        return "done"

    assert fitting(policy, work, said.append) == "done"
    assert tries[0][1] > 0
    assert tries[1:] == [(2, 0), (1, 0)]
    assert said[0].endswith("going on without recorded calls")
    with pytest.raises(Fault, match="one sample at a time"):
        fitting(policy, functools.partial(_fails, torch.OutOfMemoryError("no more")), said.append)


def _fails(error):
    raise error
