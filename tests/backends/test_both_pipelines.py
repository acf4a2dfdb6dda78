"""Both embedded pipelines, U-Net with DDIM and transformer with a flow, through the same code, held against plain diffusers."""

import functools
import inspect
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, PNDMScheduler

from diffalign.backends import diffusers
from diffalign.errors import UserError
from diffalign.models import calls, loading
from diffalign.models import lora as adapters
from diffalign.ops import gaussian
from diffalign.processes import PROCESSES
from diffalign.prompts import book
from diffalign.rewards.scorer import Scorer
from diffalign.rules import RLR, TruncatedBP
from diffalign.runtime import memory
from diffalign.shapes import models
from diffalign.training import fitting as measure
from diffalign.training.scoring import Clock
from diffalign.training.trainer import Trainer
from diffalign.types import Plan, Prompts
from tests.kit.helpers import shares_of

PROCESS = {"shapes-sd3": "flow_sde", "shapes-sd": "ddim"}
CALL = {"shapes-sd3": {"max_sequence_length": 1}, "shapes-sd": {}}
TEXTS = ["a photo of two stars", "a photo of a red circle left of a blue square"]
both = pytest.mark.parametrize("name", list(PROCESS))


def given(size: int = 1) -> Prompts:
    return book.draw([{"prompt": text} for text in TEXTS], 2, size, 0, 0)


def trained(name: str, dtype=torch.float32):
    pipe = loading.load(name, dtype)[0]
    parameters = adapters.attach(pipe, 4, 16, None, 0)
    with torch.no_grad():
        for index, (key, p) in enumerate(parameters.items()):
            p.data = p.double() if dtype == torch.float64 else p.data
            if "lora_B" in key:  # starts at zero: move it, so that the adapter matters
                p.normal_(std=0.05, generator=torch.Generator().manual_seed(index))
    return pipe, parameters


def make(name: str, steps: int = 4, guidance: float = 1.0, dtype=torch.float32, scheduler=None, **kwargs):
    pipe, parameters = trained(name, dtype)
    if scheduler is not None:
        pipe.scheduler = scheduler(pipe.scheduler.config)
    process = PROCESS.get(name, "flow_sde")
    level = {"flow_sde": 0.7, "ddim": 1.0}[process]
    call = CALL[name] if name in CALL else {k: v for k, v in models.call(name).items() if k not in calls.GIVEN}
    return diffusers.DiffusersPolicy(
        pipe,
        PROCESSES[process],
        steps=steps,
        noise_level=level,
        guidance_scale=guidance,
        call=call,
        micro_batch=4,
        parameters=parameters,
        **kwargs,
    )


def noisy(steps: int) -> Plan:
    return Plan(steps, (True,) * (steps - 1) + (False,), ())


@both
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_first_pass_log_probs_are_bit_equal(name, guidance, dtype):
    policy = make(name, guidance=guidance, dtype=dtype)
    part = policy.rollout(given(), noisy(4))
    for step in range(3):
        now = policy.transition(part, step)
        new = gaussian.log_prob(part.x[step + 1], now.mean, now.std, "mean")
        assert torch.equal(new, part.log_prob[step])
    assert torch.equal(policy.replay(part, 0, 4).x, part.x[4])


@both
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_deterministic_sampling_equals_the_plain_pipeline(name, guidance):
    policy, batch = make(name, guidance=guidance), given()
    part = policy.rollout(batch, Plan.deterministic(4))
    ours = policy.decode(part, part.x[-1]).pixels[:, 0]
    generators = [torch.Generator().manual_seed(int(seed)) for seed in batch.seed]
    plain = policy.pipe(
        batch.text, num_inference_steps=4, guidance_scale=guidance, generator=generators, output_type="pt", **CALL[name]
    )
    # float32 sums in another order: a mean of alpha and eps terms here, x_0 and direction there
    torch.testing.assert_close(ours, plain.images, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", [PNDMScheduler, DDPMScheduler, EulerDiscreteScheduler])
def test_any_ddpm_like_scheduler_is_walked_as_ddim(kind):
    """Stable Diffusion's own file names PNDM; the walk is DDIM's on the same betas, as from_config makes it."""
    own = make("shapes-sd")
    other = make("shapes-sd", scheduler=lambda config: kind.from_config(config, clip_sample=False))
    assert isinstance(other.pipe.scheduler, kind)
    expected = own.rollout(given(), Plan.deterministic(4)).x[-1]
    assert torch.equal(other.rollout(given(), Plan.deterministic(4)).x[-1], expected)


def test_a_v_prediction_pipeline_equals_the_plain_one():
    def scheduler(config):
        return DDIMScheduler.from_config(config, prediction_type="v_prediction", rescale_betas_zero_snr=True)

    policy, batch = make("shapes-sd", scheduler=scheduler), given()
    assert policy.levels.prediction == "v_prediction"
    part = policy.rollout(batch, Plan.deterministic(4))
    generators = [torch.Generator().manual_seed(int(seed)) for seed in batch.seed]
    plain = policy.pipe(
        batch.text, num_inference_steps=4, guidance_scale=1.0, generator=generators, output_type="latent"
    )
    torch.testing.assert_close(part.x[-1], plain.images, rtol=0, atol=1e-4)


def test_a_solver_of_flows_that_also_has_betas_is_not_taken_for_ddim():
    from diffusers import UniPCMultistepScheduler

    with pytest.raises(UserError, match="UniPCMultistepScheduler; allowed with that: flow_sde"):
        make("shapes-sd", scheduler=lambda config: UniPCMultistepScheduler(use_flow_sigmas=True))


@pytest.mark.parametrize("setting", ["clip_sample", "thresholding"])
def test_a_scheduler_that_clips_is_refused(setting):
    with pytest.raises(UserError, match="clips x_0"):
        make("shapes-sd", scheduler=lambda config: DDIMScheduler.from_config(config, **{setting: True}))


def test_a_process_of_the_other_kind_is_refused_with_those_that_fit():
    pipe, _ = trained("shapes-sd")
    with pytest.raises(
        UserError, match=r"got one for flow-matching schedulers, .* DDIMScheduler; allowed with that: ddim"
    ):
        diffusers.DiffusersPolicy(pipe, PROCESSES["flow_sde"], steps=4)
    with pytest.raises(UserError, match=r"sampler\.sigmas: got 'linear'"):
        diffusers.DiffusersPolicy(pipe, PROCESSES["ddim"], steps=4, sigmas="linear")
    pipe, _ = trained("shapes-sd3")
    flow = ", ".join(name for name, process in PROCESSES.items() if process.kind == "flow")
    with pytest.raises(UserError, match=rf"got one for DDPM-like schedulers, .* allowed with that: {flow}"):
        diffusers.DiffusersPolicy(pipe, PROCESSES["ddim"], steps=4)


def test_a_scheduler_of_several_calls_a_step_is_refused_by_name():
    from diffusers import FlowMatchHeunDiscreteScheduler

    pipe, _ = trained("shapes-sd3")
    pipe.scheduler = FlowMatchHeunDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(UserError, match="its FlowMatchHeunDiscreteScheduler takes 7 calls of the network for 4 steps"):
        diffusers.DiffusersPolicy(pipe, PROCESSES["flow_sde"], steps=4)


@pytest.mark.parametrize("spacing", ["linspace", "trailing", "leading"])
@pytest.mark.parametrize("steps", [7, 10])
def test_training_samples_what_the_plain_pipeline_draws_whatever_the_spacing(spacing, steps):
    from diffusers import DDIMScheduler

    pipe, _ = trained("shapes-sd")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing=spacing, clip_sample=False)
    text = ["a photo of two stars"] * 2
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    plain = pipe(text, num_inference_steps=steps, guidance_scale=1.0, generator=generators, output_type="np").images
    policy = diffusers.DiffusersPolicy(
        pipe, PROCESSES["ddim"], steps=steps, noise_level=0.0, guidance_scale=1.0, micro_batch=2
    )
    keys = np.arange(2)
    part = policy.rollout(Prompts(text, keys, keys, keys, [{}, {}]), Plan.deterministic(steps))
    drawn = policy.decode(part, part.x[-1]).pixels[:, 0].permute(0, 2, 3, 1).detach().numpy()
    np.testing.assert_allclose(drawn, plain, atol=2e-5)  # float32, another order of operations


# -- stage prompts


@both
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_stage_prompts_are_told_on_their_stretches_in_rollout_and_replay(name, guidance):
    other = ["a photo of a blue square", "a photo of three red circles"]
    staged = make(name, guidance=guidance, stretches=(0, 2))
    batch = replace(given(), stages=[(a, b) for a, b in zip(TEXTS, other, strict=True)])
    part = staged.rollout(batch, noisy(4))
    for start, stop in ((0, 4), (1, 3), (1, 2), (3, 4)):
        assert torch.equal(staged.replay(part, start, stop).x, part.x[stop])
    for step in range(3):
        now = staged.transition(part, step)
        assert torch.equal(gaussian.log_prob(part.x[step + 1], now.mean, now.std, "mean"), part.log_prob[step])
    # the same by hand: two steps with the first text, then two with the other from where they ended
    plain = make(name, guidance=guidance)
    first = plain.rollout(given(), noisy(4))
    assert torch.equal(first.x[2], part.x[2])
    assert not torch.equal(first.x[3], part.x[3])
    second = replace(first, prompts=replace(first.prompts, text=other))
    assert torch.equal(plain.replay(second, 2, 4).x, part.x[4])


# -- the reward's gradient


def brightness(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels**2).flatten(1).mean(1)


# FlowMatchEuler computes in float32 whatever it is given; DDIM's coefficients are float32 in diffusers and float64 here, and
# 1 / sqrt(abar) = 14.6 magnifies the difference, so there everything is float64.
DTYPE = {"shapes-sd3": torch.float32, "shapes-sd": torch.float64}


def full_backpropagation(name: str, steps: int, guidance: float) -> dict[str, torch.Tensor]:
    """d mean reward / d LoRA through diffusers' own loop, own scheduler and own decoding, none of it ours."""
    pipe, parameters = trained(name, DTYPE[name])
    if DTYPE[name] == torch.float64:
        pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod.double()
        pipe.scheduler.final_alpha_cumprod = pipe.scheduler.final_alpha_cumprod.double()
    batch = given()
    generators = [torch.Generator().manual_seed(int(seed)) for seed in batch.seed]
    call = inspect.unwrap(type(pipe).__call__)
    output = call(
        pipe,
        prompt=batch.text,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generators,
        output_type="pt",
        **CALL[name],
    )
    found = torch.autograd.grad(-brightness(output.images).mean(), list(parameters.values()), allow_unused=True)
    return {k: torch.zeros_like(p) if g is None else g for (k, p), g in zip(parameters.items(), found, strict=True)}


def truncated(name: str, depth, steps: int, guidance: float, **kwargs) -> dict[str, torch.Tensor]:
    policy = make(name, steps, guidance, DTYPE[name], **kwargs)
    rule = TruncatedBP(TruncatedBP.Settings(depth=depth))
    plan = rule.plan(policy.schedule, 0, np.random.default_rng(0))
    part = policy.rollout(given(), plan)
    loss = rule.loss(plan.updates[0][0], policy, part, None, lambda media: brightness(media.pixels[:, 0]))
    loss.value.backward()
    return {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in policy.parameters.items()}


def relative(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    a, b = (torch.cat([g.flatten() for g in grads.values()]).double() for grads in (found, expected))
    return float((a - b).norm() / b.norm())


@both
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("checkpoint", ["none", "blocks", "spans", "both"])
def test_truncated_bp_through_every_step_is_full_backpropagation(name, guidance, checkpoint):
    expected = full_backpropagation(name, 4, guidance)
    found = truncated(name, "all", 4, guidance, checkpoint=checkpoint)
    assert relative(found, expected) < 1e-6
    assert relative(truncated(name, 3, 4, guidance), expected) > 1e-2


def term_bytes(name: str, depth: int, steps: int, **kwargs) -> int:
    """The most bytes that one truncated backpropagation allocates at once, decoder and gradient included."""
    policy = make(name, steps, **kwargs)
    rule = TruncatedBP(TruncatedBP.Settings(depth=depth))
    plan = rule.plan(policy.schedule, 0, np.random.default_rng(0))
    part = policy.rollout(given(), plan)

    def term():
        brightness(policy.decode(part, policy.replay(part, plan.stop, steps).x).pixels).sum().backward()

    term()  # parameters have their gradients now
    return memory.peak_bytes(term)


@both
def test_memory_grows_with_the_depth_and_not_with_the_steps(name):
    two, four, six = (term_bytes(name, depth, 8) for depth in (2, 4, 6))
    assert four - two > 0.2 * two
    assert six - four == pytest.approx(four - two, rel=0.1)
    assert term_bytes(name, 2, 16) == pytest.approx(two, rel=0.02)


def laboratory(name: str, rule, steps: int) -> Trainer:
    """A trainer on the pipeline, to take gradients with; one reward, the pictures' brightness."""
    return trainer_of(rule, make(name, steps))


def trainer_of(rule, policy) -> Trainer:
    """The same on a policy."""
    scorer = Scorer({"brightness": lambda media, given: brightness(media.pixels)})
    optimizer = torch.optim.SGD(policy.parameters.values(), lr=0.0)
    policy.micro_batch = 4
    return Trainer(rule, policy, scorer, optimizer, lambda update: given(2))


def gradient_peak(trainer) -> int:
    """The most bytes that the gradient of an update's first optimiser step allocates at once, beyond what sampling left."""
    sampled = trainer._sample(0, Clock.of(trainer.policy))
    shares = shares_of(trainer, sampled)
    return memory.peak_bytes(lambda: trainer._gradient(shares, sampled, 0, 0))


@pytest.mark.parametrize("name", ["shapes-sd3", pytest.param("shapes-sd", marks=pytest.mark.wide)])
def test_invariant_20_rlr_holds_its_largest_term_only(name):
    """Whatever the length of the chain, while full backpropagation grows with it."""

    def peak(rule, steps: int) -> int:
        trainer = laboratory(name, rule, steps)
        return gradient_peak(trainer)

    def largest(rule, steps: int) -> int:
        trainer = laboratory(name, rule, steps)
        policy, terms = trainer.policy, rule.plan(trainer.policy.schedule, 0, np.random.default_rng(0)).updates[0]
        part = policy.rollout(given(2), noisy(steps))

        def work(term):
            x = policy.replay(part, term.start, term.stop).x
            return brightness(policy.decode(part, x).pixels) if term.through == "reward" else x

        for term in terms:
            work(term).sum().backward()  # parameters have their gradients now
        return max(memory.peak_bytes(lambda term=term: work(term).sum().backward()) for term in terms)

    full = {}
    for steps in (5, 10, 20):
        rule = RLR(RLR.Settings(depth=1, span=2))
        assert peak(rule, steps) == pytest.approx(largest(rule, steps), rel=0.1)  # and the gradients
        full[steps] = peak(TruncatedBP(TruncatedBP.Settings(depth="all")), steps)
    step = (full[10] - full[5]) / 5
    assert full[20] - full[10] == pytest.approx(10 * step, rel=0.05)
    assert peak(rule, 20) < full[20] / 5


@pytest.mark.parametrize("name", ["shapes-sd3", pytest.param("shapes-sd", marks=pytest.mark.wide)])
def test_a_memory_budget_chooses_depth_and_span_that_keep_to_it(name):
    trainer = laboratory(name, RLR(), 10)
    found = measure.graph_bytes(trainer.policy, trainer.scorer, given(2))
    for steps in (1.0, 2.5, 4.0):  # graphs of as many steps, beside decoder and reward
        budget = found.reward + found.work + steps * found.step + 9 * found.stored
        rule = RLR(RLR.Settings(depth="auto", span="auto", memory_gib=budget / 2**30))
        rule.fit(found, 10)
        assert rule.depth == int(steps)
        trainer = laboratory(name, rule, 10)
        assert 0.5 * budget < gradient_peak(trainer) <= 1.05 * budget
    with pytest.raises(UserError, match=r"rule\.memory_gib: got .*, one step with decoder and reward takes"):
        RLR(RLR.Settings(depth="auto", memory_gib=found.reward / 2**30)).fit(found, 10)


@pytest.mark.parametrize("name", ["shapes-sd3", "shapes-sd"])
def test_m1_m2_blocks_save_what_a_call_holds_and_spans_what_several_do(name):
    """By allocated bytes, what runs again included: saved-tensor hooks see none of it. A span saves nothing of a single call."""
    one = {form: network_bytes(name, 1, form) for form in ("none", "blocks", "spans")}
    assert one["blocks"] <= 0.4 * one["none"]
    assert one["spans"] > 0.9 * one["none"]
    five = {form: network_bytes(name, 5, form) for form in ("none", "blocks", "spans", "both")}
    assert five["both"] <= 0.2 * five["none"]
    assert five["both"] < min(five["blocks"], five["spans"])


def network_bytes(name: str, depth: int, form: str) -> int:
    """The same of a span of steps, without a decoder."""
    policy = make(name, 8, checkpoint=form)
    part = policy.rollout(given(), Plan.deterministic(8))

    def term():
        policy.replay(part, 8 - depth, 8).x.sum().backward()

    term()
    return memory.peak_bytes(term)


@pytest.mark.parametrize("name", ["shapes-sd3", "shapes-sd", "shapes-flux", "shapes-wan"])
def test_m3_what_runs_again_changes_no_bit(name):
    """Prediction and every gradient of a step, and of a span with the decoder, against nothing run again."""
    found = {}
    for form in ("none", "blocks", "spans", "both"):
        policy = make(name, 4, checkpoint=form)
        part = policy.rollout(given(), Plan.deterministic(4))
        step = policy.transition(part, 1).prediction
        assert torch.equal(step.detach(), policy_rollout_prediction(policy, part))
        step.square().sum().backward()
        brightness(policy.decode(part, policy.replay(part, 2, 4).x).pixels).sum().backward()
        found[form] = [step.detach(), *(p.grad for p in policy.parameters.values() if p.grad is not None)]
    for form in ("blocks", "spans", "both"):
        assert len(found[form]) == len(found["none"])
        assert all(torch.equal(a, b) for a, b in zip(found[form], found["none"], strict=True)), form


@torch.no_grad()
def policy_rollout_prediction(policy, part):
    """Without a graph, as a rollout runs it."""
    return policy.transition(part, 1).prediction


def test_m4_a_network_that_cannot_run_by_blocks_runs_again_whole_and_says_so(monkeypatch):
    pipe = make("shapes-sd3").pipe
    monkeypatch.setattr(type(pipe.transformer), "_supports_gradient_checkpointing", False)
    policy = make("shapes-sd3", checkpoint="blocks")
    assert policy.remarks == ["memory.checkpoint: the transformer cannot run block by block, its calls run again whole"]
    before = policy.rows_forward
    part = policy.rollout(given(), Plan.deterministic(4))
    sampled = policy.rows_forward - before
    policy.replay(part, 2, 4).x.sum().backward()
    assert policy.rows_forward - before - sampled == 2 * 2 * len(TEXTS)


@pytest.mark.parametrize("name", ["shapes-sd3", "shapes-sd", "shapes-wan"])
@pytest.mark.parametrize("form", ["none", "blocks", "both"])
def test_m5_the_count_is_what_is_allocated(name, form):
    """`plan`'s arithmetic, on figures counted for one sample on the meta device, against real bytes of a term of two and of four."""
    policy = make(name, 4, checkpoint=form)
    part = policy.rollout(given(4), Plan.deterministic(4))
    for rows in (2, 4):
        some = part.select(list(range(rows)))

        def term(some=some):
            policy.transition(some, 1).prediction.square().sum().backward()

        term()
        single = part.select([0])
        alone = memory.peak_bytes(functools.partial(term, single))
        assert memory.peak_bytes(term) == pytest.approx(rows * alone, rel=0.1)


def test_rows_that_checkpointing_runs_again_are_counted():
    policy = make("shapes-sd", checkpoint="spans")
    part = policy.rollout(given(), Plan.deterministic(4))
    before = policy.rows_forward
    policy.replay(part, 2, 4).x.sum().backward()
    assert policy.rows_forward - before == 2 * 2 * 2  # two rows, two steps, twice
    assert policy.rows_backward == 2 * 2


@both
def test_a_solver_runs_the_network_at_the_levels_it_visits(name):
    """Two first-order steps, from level 2 to 4 and from there to the end, against DDIM's formula on x_0 and noise."""
    policy = make(name, steps=6)
    plan = Plan(6, (True, True, False, False, False, False), (), solver=(2, 4))
    before = policy.rows_forward
    part = policy.rollout(given(), plan)
    assert policy.rows_forward - before == 4 * len(TEXTS)
    plain = replace(part, plan=replace(plan, solver=()))
    for start, stop in ((2, 4), (4, 6)):
        prediction = policy.transition(plain, start).prediction
        clean_x, clean_p, noise_x, noise_p = (float(c[start]) for c in policy.levels.parts())
        clean, noise = (a * part.x[start] + b * prediction for a, b in ((clean_x, clean_p), (noise_x, noise_p)))
        expected = policy.schedule.alpha[stop] * clean + policy.schedule.sigma[stop] * noise
        # float32, and x_0 of a network that predicts epsilon is x times up to 14
        torch.testing.assert_close(part.x[stop], expected.detach(), rtol=1e-4, atol=1e-5)
    assert torch.equal(policy.replay(part, 0, 6).x, part.x[6])
