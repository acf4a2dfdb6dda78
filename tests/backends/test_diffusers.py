"""The scheduler seam on the shipped pipeline: everything a rule may ask for, against diffusers itself."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from diffalign.backends import diffusers, recorder
from diffalign.errors import UserError
from diffalign.models import encodings, loading
from diffalign.models import lora as adapters
from diffalign.processes import PROCESSES
from diffalign.prompts import book
from diffalign.types import Plan, Prompts

NOISY = Plan(4, (True, True, True, False), ())
TEXTS = ["a photo of two stars", "a photo of a red circle left of a blue square"]


def given(size: int = 2) -> Prompts:
    return book.draw([{"prompt": text} for text in TEXTS], 2, size, 0, 0)


def make(sigmas="linear", guidance=1.0, dtype=torch.float32, train=True, **kwargs):
    pipe = loading.load("shapes-sd3", dtype)[0]
    parameters = adapters.attach(pipe, 4, 16, None, 0) if train else {}
    with torch.no_grad():
        for index, (name, p) in enumerate(parameters.items()):
            if "lora_B" in name:  # starts at zero: move it, so that the adapter matters
                p.normal_(std=0.05, generator=torch.Generator().manual_seed(index))
    return diffusers.DiffusersPolicy(
        pipe,
        PROCESSES["flow_sde"],
        steps=4,
        noise_level=0.7,
        guidance_scale=guidance,
        sigmas=sigmas,
        call={"max_sequence_length": 1},
        micro_batch=4,
        parameters=parameters,
        **kwargs,
    )


@pytest.fixture(scope="module")
def policy():
    return make()


@pytest.fixture(scope="module")
def part(policy):
    return policy.rollout(given(), NOISY)


@pytest.mark.parametrize(("start", "stop"), [(0, 4), (2, 4), (1, 2)])
def test_replay_is_bit_equal_and_has_a_gradient(policy, part, start, stop):
    found = policy.replay(part, start, stop)
    assert torch.equal(found.x, part.x[stop])
    assert all(
        g is not None and g.isfinite().all()
        for g in torch.autograd.grad(
            found.x.sum(), [p for n, p in policy.parameters.items() if "lora_B" in n], allow_unused=True
        )
        if g is not None
    )
    assert found.x.requires_grad


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_T12_first_pass_log_probs_are_bit_equal(guidance, dtype):
    policy = make(guidance=guidance, dtype=dtype)
    part = policy.rollout(given(), NOISY)
    from diffalign.ops import gaussian

    for step in range(3):
        now = policy.transition(part, step)
        assert now.mean.dtype == torch.float32
        new = gaussian.log_prob(part.x[step + 1], now.mean, now.std, "mean")
        assert torch.equal(new, part.log_prob[step])


@pytest.mark.parametrize("sigmas", ["pipeline", "linear"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_deterministic_sampling_equals_the_plain_pipeline(sigmas, guidance):
    policy = make(sigmas, guidance)
    batch = given(1)
    part = policy.rollout(batch, Plan.deterministic(4))
    ours = policy.decode(part, part.x[-1]).pixels[:, 0]
    call = {"sigmas": np.linspace(1, 0, 5)[:-1].tolist()} if sigmas == "linear" else {}
    plain = policy.pipe(
        batch.text,
        num_inference_steps=4,
        guidance_scale=guidance,
        max_sequence_length=1,
        generator=[torch.Generator().manual_seed(int(seed)) for seed in batch.seed],
        output_type="pt",
        **call,
    ).images
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)


def test_the_two_spacings_differ():
    assert not np.allclose(make("pipeline").schedule.sigma, make("linear").schedule.sigma)
    np.testing.assert_allclose(make("linear").schedule.sigma, [1, 0.75, 0.5, 0.25, 0], atol=1e-7)


def test_predict_agrees_with_a_transition_and_takes_a_time_per_sample(policy, part):
    now = policy.transition(part, 2).prediction
    time = torch.full((4,), float(policy.schedule.sigma[2]))
    torch.testing.assert_close(policy.predict(part, part.x[2], time), now, rtol=0, atol=1e-6)
    time[3] = 0.9
    mixed = policy.predict(part, part.x[2], time)
    torch.testing.assert_close(mixed[:3], now[:3], rtol=0, atol=1e-5)
    assert (mixed[3] - now[3]).abs().max() > 1e-2


def test_decode_has_the_gradient_of_finite_differences(policy, part):
    x = part.x[-1][:1].clone().requires_grad_()
    one = part.select([0])

    def value(z):
        return policy.decode(one, z).pixels.double().mean()

    (slope,) = torch.autograd.grad(value(x), x)
    direction, h = slope / slope.norm(), 0.02  # steepest, so that kinks of ReLU and of the clamp weigh little
    with torch.no_grad():
        numeric = (value(x + h * direction) - value(x - h * direction)) / (2 * h)
    assert float((slope * direction).sum()) == pytest.approx(float(numeric), rel=0.05)
    assert policy.decode(part, part.x[-1]).pixels.min() >= 0
    assert policy.decode(part, part.x[-1]).pixels.shape == (4, 1, 3, 64, 64)


def test_T40_reference_is_the_base_model_bit_for_bit_and_restores_everything(policy, part):
    base = make(train=False)
    expected = base.transition(part, 1).prediction
    flags = {name: p.requires_grad for name, p in policy.parameters.items()}
    with pytest.raises(KeyError), policy.reference():
        found = policy.transition(part, 1).prediction
        raise KeyError
    assert torch.equal(found, expected)
    assert not found.requires_grad
    assert {name: p.requires_grad for name, p in policy.parameters.items()} == flags
    assert all(flags.values())
    assert not torch.equal(policy.transition(part, 1).prediction, expected)


def test_a_fresh_adapter_is_the_base_model():
    pipe = loading.load("shapes-sd3")[0]
    before = pipe(
        "a photo of a star", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt"
    )
    adapters.attach(pipe, 4, 16, None, 0)
    after = pipe(
        "a photo of a star", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt"
    )
    assert torch.equal(before.images, after.images)


def test_a_run_leaves_the_pipeline_as_it_was(policy, part):
    assert not isinstance(policy.pipe.scheduler, recorder._Recording)
    assert "prepare_latents" not in vars(policy.pipe)
    assert "encode_prompt" not in vars(policy.pipe)


def test_prompts_are_encoded_once_per_batch(policy, part, monkeypatch):
    calls = []
    monkeypatch.setattr(policy.seam.encodings, "_encode", lambda *a, **k: calls.append(a) or 1 / 0)
    policy.transition(part, 1)
    assert not calls


def test_encoded_prompts_are_kept_up_to_a_budget(monkeypatch):
    policy = make(train=False)
    batch = given()
    one = [batch.select([k]) for k in range(len(batch))]
    for each in one:
        policy.rollout(each, NOISY)
    kept = policy.seam.encodings._memory
    assert len(kept) == 1 + len({each.text[0] for each in one})  # and that of the first empty run
    monkeypatch.setattr(encodings, "MEMORY_BYTES", 1)
    last = policy.rollout(one[0], NOISY).x[-1]
    policy.rollout(batch, NOISY)
    assert len(kept) == 1
    assert torch.equal(policy.rollout(one[0], NOISY).x[-1], last)


def test_rows_are_counted_where_the_network_runs():
    policy = make(guidance=3.0)
    part = policy.rollout(given(), NOISY)
    assert (policy.rows_forward, policy.rows_backward) == (2 * 4 * 4, 0)
    policy.transition(part, 1)
    assert (policy.rows_forward, policy.rows_backward) == (2 * 4 * 5, 2 * 4)


def test_global_random_state_is_not_touched(policy, part):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    policy.decode(part.select([0]), policy.replay(part.select([0]), 0, 4).x)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_scheduler_of_another_kind_is_refused():
    pipe = loading.load("shapes-sd3")[0]
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(UserError, match="got one for flow-matching schedulers"):
        diffusers.DiffusersPolicy(pipe, PROCESSES["flow_sde"], steps=4)


def test_a_model_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match="model: cannot load") as caught:
        loading.load(str(tmp_path / "nothing"))
    assert len(caught.value.problems) == 1
    assert "\n" not in caught.value.problems[0]
