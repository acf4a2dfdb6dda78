"""Guidance on some steps only: rollouts, replays and evaluations agree, and rows are counted by hand."""

import functools

import numpy as np
import pytest
import torch

from diffalign.backends import diffusers, guiding
from diffalign.backends.plain import PartlyGuided
from diffalign.errors import UserError
from diffalign.models import loading
from diffalign.models import lora as adapters
from diffalign.ops import gaussian
from diffalign.processes import PROCESSES
from diffalign.prompts import book
from diffalign.shapes import models
from diffalign.types import Plan, Term
from tests.families import FAMILIES, build

STEPS = 4
PROCESS = {"shapes-sd3": "flow_sde", "shapes-sd": "ddim", "shapes-wan": "flow_sde"}
NOISY = Plan(STEPS, (True, True, True, False), ())
TEXTS = ["a red circle", "a blue square"]


def given(size=1):
    return book.draw([{"prompt": text} for text in TEXTS], 2, size, 0, 0)


@functools.cache
def make(name="shapes-sd3", steps=None, guidance=3.0, dtype=torch.float32, call=(), train=True):
    pipe = loading.load(name, dtype)[0]
    parameters = adapters.attach(pipe, 4, 16, None, 0) if train else {}
    with torch.no_grad():
        for index, (key, p) in enumerate(parameters.items()):
            if "lora_B" in key:  # starts at zero: move it, so that the adapter matters
                p.normal_(std=0.05, generator=torch.Generator().manual_seed(index))
    return diffusers.DiffusersPolicy(
        pipe,
        PROCESSES[PROCESS.get(name, "flow_sde")],
        steps=STEPS,
        noise_level=0.7,
        guidance_scale=guidance,
        call={**models.call(name), **dict(call)},
        micro_batch=2,
        parameters=parameters,
        guidance_steps=steps,
    )


def finished(name, steps=None, guidance=3.0):
    """A chain's last latents, and the network rows it took."""
    policy = make(name, steps, guidance)
    before = policy.rows_forward
    return policy.rollout(given(), Plan.deterministic(STEPS)).x[-1], policy.rows_forward - before


@pytest.mark.parametrize("name", PROCESS)
def test_22_all_steps_are_as_none_said_and_no_steps_as_guidance_one(name):
    (everywhere, most), (whole, all_of_them) = finished(name), finished(name, (0, STEPS))
    (nowhere, none), (without, least) = finished(name, (0, 0)), finished(name, guidance=1.0)
    some, between = finished(name, (1, 3))
    assert torch.equal(whole, everywhere)
    assert torch.equal(nowhere, without)
    assert not torch.equal(some, everywhere)
    assert not torch.equal(some, without)
    assert (most, all_of_them) == (2 * STEPS * 2, 2 * STEPS * 2)
    assert (none, least, between) == (STEPS * 2, STEPS * 2, (STEPS + 2) * 2)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in PROCESS), ("shapes-sd3", torch.bfloat16)]
)
def test_23_first_pass_ratios_are_one_on_both_sides_and_across(name, dtype):
    policy = make(name, (1, 3), dtype=dtype)
    part = policy.rollout(given(), NOISY)
    for step in range(3):
        now = policy.transition(part, step)
        assert torch.equal(gaussian.log_prob(part.x[step + 1], now.mean, now.std, "mean"), part.log_prob[step])
    for start, stop in ((0, 4), (0, 2), (1, 3), (2, 4)):
        with torch.set_grad_enabled(stop - start == 2):
            assert torch.equal(policy.replay(part, start, stop).x, part.x[stop])


def test_23_windows_keep_the_ratio_at_one():
    """A window that begins without guidance and ends with it, as a rule would plan it."""
    policy = make(steps=(2, 4))
    window = Plan(STEPS, (False, True, True, False), ((Term(1, 3, "log_prob"),),))
    part = policy.rollout(given(), window)
    for step in (1, 2):
        now = policy.transition(part, step)
        assert torch.equal(gaussian.log_prob(part.x[step + 1], now.mean, now.std, "mean"), part.log_prob[step])


def test_23_the_guidance_of_a_step_is_the_plain_pipelines():
    """Each step of a chain with guidance on [1, 3) predicts as the chain with guidance, or the one without, does from the same latents."""
    some, everywhere, without = make(steps=(1, 3)), make(), make(guidance=1.0)
    part = some.rollout(given(), NOISY)
    for step in range(STEPS):
        own, guided, plain = (policy.transition(part, step).prediction for policy in (some, everywhere, without))
        assert torch.equal(own, guided if step in (1, 2) else plain)
        assert not torch.equal(guided, plain)


def test_23_any_time_is_guided_as_the_nearest_step_is():
    some, everywhere, without = make("shapes-wan", (1, 3)), make("shapes-wan"), make("shapes-wan", guidance=1.0)
    part = some.rollout(given(), NOISY)
    x, sigma = part.x[-1], some.schedule.sigma
    time = torch.tensor([sigma[1] - 0.01, 0.01], dtype=torch.float32)
    with torch.no_grad():
        own, guided, plain = (policy.predict(part, x, time) for policy in (some, everywhere, without))
    # Two calls of one row instead of one of two: last bits of matrix products, of numbers up to 3, times the guidance (1.5e-5 seen).
    torch.testing.assert_close(own[:1], guided[:1], rtol=0, atol=1e-4)
    torch.testing.assert_close(own[1:], plain[1:], rtol=0, atol=1e-4)
    assert (guided - plain).abs().amax(tuple(range(1, guided.ndim))).min() > 1e-3
    alike = torch.full((2,), float(sigma[1]))
    assert torch.equal(some.predict(part, x, alike), everywhere.predict(part, x, alike))


@pytest.mark.parametrize("name", PROCESS)
def test_24_rows_are_those_of_a_count_by_hand(name):
    policy = make(name, (1, 3))
    policy.rows_forward = policy.rows_backward = 0
    part = policy.rollout(given(), NOISY)
    assert policy.rows_forward == 2 * (1 + 2 + 2 + 1)
    policy.rows_forward = policy.rows_backward = 0
    policy.replay(part, 2, 4)
    assert (policy.rows_forward, policy.rows_backward) == (2 * (2 + 1), 2 * (2 + 1))
    policy.rows_forward = 0
    times = torch.tensor(policy.schedule.timestep.astype(np.float32)) / policy.scale
    for time in times:
        policy.predict(part, part.x[-1], time.expand(2))
    assert policy.rows_forward == 2 * (1 + 2 + 2 + 1)
    if name == "shapes-wan":  # where the two predictions are two calls, samples may have times of their own
        policy.rows_forward = 0
        policy.predict(part, part.x[-1], times[:2])
        assert policy.rows_forward == 1 + 2
    with policy.guided_throughout():
        policy.rows_forward = 0
        policy.transition(part, 0)
        assert policy.rows_forward == 2 * 2


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_25_guidance_that_is_no_second_prediction_is_refused(guidance):
    refusal = r"sampler.guidance_steps: got \[0, 2\], FluxPipeline predicts once a step .*; allowed is null, or .* a negative_prompt"
    with pytest.raises(UserError, match=refusal):
        make("shapes-flux", (0, 2), guidance, train=False)
    with pytest.raises(UserError, match="StableDiffusion3Pipeline predicts once a step .* guidance_scale above 1"):
        make("shapes-sd3", (0, 2), 1.0, train=False)


def test_25_a_second_prediction_beside_embedded_guidance_is_found():
    policy = make("shapes-flux", (0, 2), 3.5, call=(("true_cfg_scale", 3.0), ("negative_prompt", "")), train=False)
    assert policy.seam.unguided == {"true_cfg_scale": 1.0}


SWITCH = {
    **{name: {"guidance_scale": 1.0} for name in FAMILIES},
    "Qwen-Image": {"true_cfg_scale": 1.0},
    "Z-Image": {"guidance_scale": 0.0},
    **dict.fromkeys(("FLUX.1-dev", "FLUX.1-schnell", "FLUX.2-dev", "HunyuanVideo"), None),
}


@pytest.mark.slow  # 17 pipelines
@pytest.mark.parametrize("name", FAMILIES)
def test_what_switches_guidance_off_is_found_in_every_family(name):
    family, found = FAMILIES[name], SWITCH[name]

    def policy(steps, guidance=3.0):
        call = {**family.call, **({} if family.guide == "guidance_scale" else {family.guide: guidance})}
        scale = guidance if family.guide == "guidance_scale" else None
        return diffusers.DiffusersPolicy(
            build(name),
            PROCESSES[family.process],
            steps=3,
            guidance_scale=scale,
            call=call,
            micro_batch=2,
            guidance_steps=steps,
        )

    if found is None:
        with pytest.raises(UserError, match="predicts once a step"):
            policy((0, 2))
        return
    none = policy((0, 0))
    assert none.seam.unguided == found
    plan, texts = Plan.deterministic(3), given(1)
    off = next(iter(found.values()))
    assert torch.equal(none.rollout(texts, plan).x[-1], policy(None, off).rollout(texts, plan).x[-1])
    some = policy((0, 2))
    some.rollout(texts, plan)
    assert some.rows_forward == 2 * (2 + 2 + 1)


@pytest.mark.parametrize("name", ["shapes-sd3", "shapes-sd", "shapes-wan"])
def test_a_plain_call_in_stretches_gives_what_one_gives(name):
    """By the pipeline's own scheduler, solvers that remember included."""
    pipe = loading.load(name)[0]
    kind = PROCESSES[PROCESS[name]].kind
    if kind == "ddpm":
        from diffalign.backends import recorder

        pipe.scheduler = recorder.as_ddim(pipe.scheduler)
    call = {**models.call(name), "num_inference_steps": STEPS, "guidance_scale": 3.0}

    def drawn(run, **more):
        generators = [torch.Generator().manual_seed(k) for k in range(2)]
        return np.asarray(run(prompt=TEXTS, generator=generators, output_type="np", **call, **more)[0])

    expected = drawn(pipe)
    np.testing.assert_array_equal(drawn(PartlyGuided(pipe, kind, call, (0, STEPS))), expected)
    own = drawn(PartlyGuided(pipe, kind, call, (0, 2)))
    assert np.abs(own - expected).max() > 1e-3
    cut = PartlyGuided(pipe, kind, call, (1, 3))
    cut.seam.unguided = {}  # cut, but guided everywhere
    np.testing.assert_array_equal(drawn(cut), expected)


def test_the_pieces_of_a_chain_are_cut_where_guidance_changes():
    times = np.linspace(1, 0.1, 5)
    assert guiding.GuidedSteps((1, 3), times).pieces() == [([0], False), ([1, 2], True), ([3, 4], False)]
    assert guiding.GuidedSteps(None, times).pieces() == [([0, 1, 2, 3, 4], True)]
    assert guiding.GuidedSteps((0, 0), times).pieces() == [([0, 1, 2, 3, 4], False)]
