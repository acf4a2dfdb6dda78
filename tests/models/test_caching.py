"""A cache of features: what it spares, that each trajectory begins without one, and that nothing else ever sees it."""

import functools

import pytest
import torch

from diffalign import config as configs
from diffalign.backends.diffusers import DiffusersPolicy
from diffalign.errors import UserError
from diffalign.models import loading, lora
from diffalign.models.caching import ABLE, Cache
from diffalign.models.calls import GIVEN
from diffalign.models.recordings import Call, Tools
from diffalign.processes import PROCESSES
from diffalign.prompts import book
from diffalign.rewards.scorer import Scorer
from diffalign.rules import RULES
from diffalign.runs import parts
from diffalign.runtime.memory import fitting
from diffalign.runtime.sharding import blocks
from diffalign.shapes import models
from diffalign.training.trainer import Trainer
from diffalign.types import Plan
from tests import families
from tests.kit.helpers import tiny_config
from tests.models.test_graphs import again

STEPS = 5
ALL = 10.0  # a threshold that no step of these pipelines reaches: the largest difference is below 1
PLAN = Plan.deterministic(STEPS)
GUIDED = {"shapes-flux": 1.0, "shapes-wan": 3.0}  # the second is called with and without the prompt


def given(groups=2, size=2):
    texts = ("two stars", "a red circle", "three blue squares")[:groups]
    return book.draw([{"prompt": text} for text in texts], groups, size, 0, 0)


def made(name="shapes-flux", cache=True, checkpoint="none", recorded=False):
    pipe, _ = loading.load(name, torch.float32, "cpu")
    parameters = lora.attach(pipe, 4, 8, None, 0)
    for index, p in enumerate(parameters.values()):
        p.data.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(index)) * 0.05)
    return DiffusersPolicy(
        pipe,
        PROCESSES["ode"],
        steps=STEPS,
        guidance_scale=GUIDED[name],
        call={k: v for k, v in models.call(name).items() if k not in GIVEN},
        micro_batch=2,
        parameters=parameters,
        checkpoint=checkpoint,
        recorder=Tools(again(parameters), lambda work: work(), "cpu") if recorded else None,
        cache=Cache(ALL) if cache else None,
    )


@functools.cache
def shared(name):
    return made(name)


def drawn(policy, threshold, prompts=None):
    """Latents of every level of a rollout, and calls of blocks: those made, those run."""
    policy.cache.threshold, policy.cache.called, policy.cache.run = threshold, 0, 0
    with policy.cached():
        found = policy.rollout(prompts or given(), PLAN)
    return found.x, policy.cache.called, policy.cache.run


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def network_of(policy):
    return lora.denoisers(policy.pipe)["transformer"]


class Runs:
    """Calls of each block's attention, which only a block that is run makes: with gradient, and all."""

    def __init__(self, policy):
        self.all = self.with_gradient = 0
        self.hooks = [
            getattr(block, "attn", getattr(block, "attn1", None)).register_forward_pre_hook(self._saw)
            for block in blocks(network_of(policy))
        ]

    def _saw(self, module, args):
        self.all += 1
        self.with_gradient += torch.is_grad_enabled()


@pytest.mark.parametrize("name", GUIDED)
def test_threshold_zero_gives_the_bits_of_a_rollout_without(name):
    policy = shared(name)
    plain = policy.rollout(given(), PLAN).x
    x, called, run = drawn(policy, 0.0)
    assert equal(x, plain) and called == run > 0


@pytest.mark.parametrize("name", GUIDED)
def test_a_high_threshold_runs_the_first_step_and_every_first_block(name):
    """Once for each micro-batch, and for calls with and without the prompt: were they one, the second would be spared too."""
    policy = shared(name)
    seen = Runs(policy)
    x, called, run = drawn(policy, ALL)
    [hook.remove() for hook in seen.hooks]
    count = len(blocks(network_of(policy)))
    trajectories = 2 * (2 if GUIDED[name] > 1 else 1)
    assert called == trajectories * STEPS * count
    assert run == trajectories * (count + STEPS - 1) == seen.all
    plain = policy.rollout(given(), PLAN).x
    assert equal(x[:2], plain[:2]) and not equal(x[2:3], plain[2:3])  # the first step is whole


@torch.no_grad()
def rest_of(policy, threshold):
    """What the blocks after the first added to the features, step by step: the first is asked again for what it gives alone."""
    network, inputs, last = network_of(policy), [], []
    first = network.transformer_blocks[0]
    hooks = [
        first.register_forward_pre_hook(lambda module, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True),
        network.norm_out.register_forward_pre_hook(lambda module, args: last.append(args[0])),
    ]
    drawn(policy, threshold, given(1))
    [hook.remove() for hook in hooks]
    return [after - first(*args, **kwargs)[1] for after, (args, kwargs) in zip(last, inputs, strict=True)]


def test_a_spared_step_has_the_change_that_the_rest_made_in_the_first():
    policy = shared("shapes-flux")
    whole, spared = rest_of(policy, 0.0), rest_of(policy, ALL)
    size = float(whole[0].abs().mean())
    assert float((whole[2] - whole[0]).abs().mean()) > 0.05 * size
    # Differences of float32 sums: their rounding.
    assert all(float((change - whole[0]).abs().max()) < 1e-4 * size for change in spared)


def test_every_trajectory_begins_without_one(monkeypatch):
    """Two in a row are each as if alone, and as with another before them; also in a pipeline whose call does not end by clearing it."""
    policy, prompts = shared("shapes-flux"), given(3, 2)
    monkeypatch.setattr(type(network_of(policy)), "_reset_stateful_cache", lambda network, recurse=True: None)
    whole = drawn(policy, ALL, prompts)[0]
    for rows in ([4, 5], [0, 1], [2, 3]):
        alone = drawn(policy, ALL, prompts.select(rows))[0]
        assert equal(alone, [x[rows] for x in whole])


def test_nothing_is_left_on_the_network_and_only_rollouts_within_the_context_have_it():
    policy, bare = shared("shapes-flux"), made(cache=False)
    parts = blocks(network_of(policy))
    assert equal(policy.rollout(given(), PLAN).x, bare.rollout(given(), PLAN).x)
    drawn(policy, ALL)
    assert not any("forward" in vars(block) for block in parts) and not network_of(policy).is_cache_enabled
    with policy.cached():  # also where somebody asks for a gradient in between
        part = policy.rollout(given(), PLAN)
        seen = Runs(policy)
        policy.transition(part, 2)
        [hook.remove() for hook in seen.hooks]
    assert seen.all == seen.with_gradient == len(parts)


def test_training_runs_every_block():
    """Of one update with and without: the same calls, but for those that the rollout was spared; blocks run again for the gradient."""
    found = []
    for cache in (False, True):
        policy = made(cache=cache, checkpoint="blocks")
        rule = RULES["nft"](RULES["nft"].Settings(times=2))
        optimizer = torch.optim.AdamW(policy.parameters.values(), lr=1e-3)
        scorer = Scorer({"red": lambda media, prompts: media.pixels[:, :, 0].double().mean((1, 2, 3)).numpy()})
        trainer = Trainer(rule, policy, scorer, optimizer, lambda update: given())
        seen = Runs(policy)
        found.append((seen, trainer.update(0)))
    (plain, _), (spared, update) = found
    count = len(blocks(network_of(policy)))
    assert plain.with_gradient == spared.with_gradient > 0
    assert plain.all - spared.all == 2 * (STEPS - 1) * (count - 1)
    assert update.metrics["cache/spared"] == pytest.approx((STEPS - 1) * (count - 1) / (STEPS * count))


def test_the_old_policy_samples_with_its_own_parameters():
    policy = made()
    before = drawn(policy, ALL)[0]
    policy.add_shadows(["old"])
    for p in policy.parameters.values():
        p.data.mul_(-3)
    now = drawn(policy, ALL)[0]
    with policy.shadow("old"):
        old = drawn(policy, ALL)[0]
    assert equal(old, before) and not equal(now, before)


def test_too_little_memory_in_the_midst_begins_anew():
    """The attempt that failed leaves nothing behind; the smaller micro-batch draws as it would by itself."""
    policy, calls = made(), []

    def scarce(module, args):
        calls.append(len(calls))
        if len(calls) == 4:
            raise torch.OutOfMemoryError("out of memory")

    hook = network_of(policy).transformer_blocks[0].attn.register_forward_pre_hook(scarce)
    x = fitting(policy, lambda: drawn(policy, ALL)[0], lambda line: None)
    hook.remove()
    assert policy.micro_batch == 1 and len(calls) == 4 + 4 * STEPS
    assert not any("forward" in vars(block) for block in blocks(network_of(policy)))
    assert equal(x, drawn(policy, ALL)[0])


def test_recordings_rest_while_it_is_on(monkeypatch):
    """A recorded call would run the blocks that its first run did."""
    played, run = [], Call.run
    monkeypatch.setattr(Call, "run", lambda call, leaves: played.append(call) or run(call, leaves))
    policy = made(recorded=True)
    policy.rollout(given(), PLAN)
    before = len(played)
    assert before > 0
    assert equal(drawn(policy, ALL)[0], drawn(shared("shapes-flux"), ALL)[0]) and len(played) == before
    policy.rollout(given(), PLAN)
    assert len(played) > before


EXACT = [name for name, rule in RULES.items() if rule().needs.exact_steps]
ON = "sampler.cache={name: first_block, threshold: 0.1}"


def problems(name, *more):
    with pytest.raises(UserError) as caught:
        configs.load(name, [ON, "run_dir=run", *more])
    return [line for line in caught.value.problems if line.startswith("sampler.cache")]


@pytest.mark.parametrize("rule", EXACT)
def test_rules_that_need_every_step_are_refused_with_the_others_named(rule):
    preset = {"ddpo": "ddpo/shapes-sd", "truncated_bp": "truncated_bp/shapes-flux"}.get(rule, f"{rule}/shapes-sd3")
    (line,) = problems(preset)
    assert line == (
        f"sampler.cache: got first_block, {rule} learns from the steps a sample was made by, which must be the network's own; "
        "allowed is null, or a rule that learns from finished samples alone: awm, nft"
    )


@pytest.mark.parametrize(("more", "why"), [("speed=compile", "speed compile"), ("memory.shard=blocks", "memory.shard")])
def test_what_cannot_go_with_it_is_refused(more, why):
    (line,) = problems("nft/shapes-sd3", more)
    assert f"got first_block with {why}" in line and "allowed" in line


@pytest.mark.parametrize(
    ("model", "network", "more"),
    [
        ("shapes-sd3", "SD3Transformer2DModel", ()),
        ("shapes-sd", "UNet2DConditionModel", ("sampler.process=ddim", "sampler.sigmas=pipeline")),
    ],
)
def test_networks_that_keep_no_features_are_refused_with_those_named_that_do(model, network, more, tmp_path):
    config = tiny_config(tmp_path, ON, f"model={model}", "sampler.pipeline_args={}", *more, name="nft/shapes-sd3")
    with pytest.raises(
        UserError, match=f"{network}. keeps no features between steps; allowed is null, or a model of FLUX"
    ):
        parts.build(config)


def with_two_blocks(name):
    """A family's tiny pipeline; where it has one block alone, which leaves none to spare, with two."""
    pipe = families.FAMILIES[name].make()
    for key, network in lora.denoisers(pipe).items():
        if len(blocks(network)) == 1:
            setattr(pipe, key, type(network).from_config({**network.config, "num_layers": 2}))
    return pipe


@pytest.mark.slow
@pytest.mark.parametrize("name", families.FAMILIES)
def test_the_families_that_are_named_are_those_that_can(name):
    family = families.FAMILIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = with_two_blocks(name)
    guided = 3.0 if family.guide == "guidance_scale" else None
    make = functools.partial(
        DiffusersPolicy, pipe, PROCESSES[family.process], steps=3, guidance_scale=guided, call=family.call
    )
    if name.startswith(ABLE):
        make(cache=Cache(0.1))
    else:
        with pytest.raises(UserError, match="sampler.cache: got first_block, this model's"):
            make(cache=Cache(0.1))
