"""What `auto` becomes: by trials and by the clock on a card, by a rule without one, and the same when a run is taken up again."""

import dataclasses
import math

import pytest
import torch

from diffalign import config as configs
from diffalign.config import schema
from diffalign.errors import Fault
from diffalign.runs import choosing, devices, parts
from diffalign.runs.choosing import Stopwatch, candidates, largest_that_pays
from diffalign.runs.session import train
from diffalign.runtime import remembered, trials
from diffalign.runtime.distributed import ALONE
from diffalign.runtime.trials import Trial
from diffalign.runtime.yaml_text import parse
from tests.models.test_graphs import again

SMALL = ("updates=1", "evaluation.enabled=false", "output.samples=1", "sampler.steps=3", "rule.window=null")


def load(folder, *more):
    return configs.load("flow_grpo/shapes-sd3", [*SMALL, f"run_dir={folder}", "optimizer.micro_batch=auto", *more])


def test_sizes_that_are_tried_divide_an_update_and_leave_every_process_one():
    assert candidates(4, 64, 1) == [4, 8, 16, 32, 64]
    assert candidates(4, 64, 4) == [4, 8, 16]
    assert candidates(7, 21, 1) == [7]
    assert candidates(16, 16, 2) == [16]  # refused elsewhere, where it is said


def test_a_size_is_taken_as_long_as_doubling_pays():
    asked = []

    def seconds(size):
        asked.append(size)
        return {4: 1.0, 8: 0.6, 16: 0.58, 32: 0.1}.get(size, math.inf)

    assert largest_that_pays(seconds, [4, 8, 16, 32]) == (8, 0.6)
    assert asked == [4, 8, 16]
    assert largest_that_pays(lambda size: 1.0 if size == 4 else math.inf, [4, 8]) == (4, 1.0)  # out of memory
    assert largest_that_pays(lambda size: math.inf, [4, 8]) == (4, math.inf)


def test_auto_without_a_card_is_written_down_and_stays_when_the_run_goes_on(tmp_path, monkeypatch):
    train(load(tmp_path, "prompts.groups=2", "prompts.group_size=9"), quiet=True)
    first = parse((tmp_path / "config.yaml").read_text(), "config")
    assert (first["optimizer"]["micro_batch"], first["attention"]) == (9, "native")
    # 18 samples could also be taken 6 at a time: what was chosen stays, though nobody named it.
    monkeypatch.setattr(schema, "USUAL", 8)
    again_ = load(tmp_path, "prompts.groups=2", "prompts.group_size=9", "updates=2")
    assert again_.micro_batch == 6
    train(again_, quiet=True)
    assert parse((tmp_path / "config.yaml").read_text(), "config")["optimizer"]["micro_batch"] == 9


def found(**kinds):
    ms = {form: 1.0 + k for k, form in enumerate(trials.BACKENDS)}
    return {
        form: [Trial(form, 64, 704, mask, kinds.get(form, "right"), "", ms[form]) for mask in (False, True)]
        for form in trials.BACKENDS
    }


def test_attention_is_torchs_own_unless_that_could_be_wrong():
    assert trials.right_one(found(), choosing.OWN) == "native"
    assert trials.right_one(found(_native_cudnn="fault"), choosing.OWN) == "native"  # never chosen by itself
    assert trials.right_one(found(_native_flash="wrong"), choosing.OWN) == "_native_efficient"
    assert trials.right_one(found(_native_flash="refused"), choosing.OWN) == "native"
    with pytest.raises(Fault, match="no kernel of this card is right"):
        trials.right_one(found(**dict.fromkeys(trials.BACKENDS, "wrong")), choosing.OWN)


@pytest.fixture
def card(monkeypatch, tmp_path):
    """As if there were one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(devices, "device", lambda config: "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A Card")


def test_a_card_is_tried_once(monkeypatch, card, tmp_path):
    said, asked = [], []
    monkeypatch.setattr(trials, "all_tried", lambda: asked.append(1) or found(_native_flash="wrong"))
    for _ in range(2):
        config = choosing.attention(load(tmp_path), ALONE, said.append)
        assert config.attention == "_native_efficient"
    assert asked == [1]
    assert said[0] == "A Card: trying its attention kernels, once"
    assert said.count(said[1]) == 2 and "one is wrong on this card" in said[1]
    assert choosing.attention(load(tmp_path, "attention=native"), ALONE, said.append).attention == "native"


def test_what_cannot_be_remembered_is_said(monkeypatch, card, tmp_path):
    (tmp_path / "cache").write_text("a file")
    said = []
    remembered.remember("x", 1, said.append)
    assert said[0].startswith("cannot keep what was found out about this machine (") and remembered.recall("x") is None


def policy_of(config):
    """A policy whose calls are recorded by a stand-in."""
    made = parts.build(config, lambda line: None).policy
    for graphs in made.graphs:
        graphs.tools = dataclasses.replace(
            graphs.tools, record=again(made.parameters), warm_up=lambda w: w(), device="cpu"
        )
    return made


def test_timing_chooses_and_leaves_nothing_behind(monkeypatch, card, tmp_path):
    config = load(tmp_path, "prompts.groups=2", "prompts.group_size=8", "device=cpu")
    monkeypatch.setattr(parts, "device", lambda config: "cpu")
    policy = policy_of(config)
    assert policy.graphs
    before = {name: p.clone() for name, p in policy.parameters.items()}
    clocked = []

    def measured(self, size):
        drawn = config.book.draw(2, 8, 0, 0).select(range(size))
        for _ in range(2):
            self._once(drawn)
        clocked.append((size, policy.graphs[0].on, policy.graphs[0].recorded))
        return 1.0 / size if policy.graphs[0].on else 0.01

    monkeypatch.setattr(Stopwatch, "_measured", measured)
    said = []
    chosen = choosing.timed(config, policy, ALONE, said.append)
    assert (chosen.micro_batch, policy.micro_batch, policy.graphs[0].on) == (16, 16, False)
    assert clocked == [(16, True, 2), (16, False, 0)]
    assert (policy.rows_forward, policy.rows_backward) == (0, 0)
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in policy.parameters.items())
    assert said[-1] == "auto, here micro-batches of 16"
    again_, clocked[:] = policy_of(config), []
    choosing.timed(config, again_, ALONE, said.append)
    assert not clocked and not again_.graphs[0].on  # remembered


def test_too_little_memory_ends_the_search_and_other_failures_are_not_hidden(monkeypatch, tmp_path):
    config = load(tmp_path, "prompts.groups=2", "prompts.group_size=8")
    policy = parts.build(config, lambda line: None).policy
    clock = Stopwatch(config, policy)
    errors = {8: torch.OutOfMemoryError("CUDA out of memory"), 4: RuntimeError("a shape")}

    def once(prompts):
        raise errors[len(prompts)]

    monkeypatch.setattr(clock, "_once", once)
    assert clock(8) == math.inf
    with pytest.raises(RuntimeError, match="a shape"):
        clock(4)
    clock.spent = choosing.SECONDS
    assert clock(4) == math.inf  # no time left
