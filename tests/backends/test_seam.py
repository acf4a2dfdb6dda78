"""A pipeline that the seam cannot drive is the user's choice: one line that says what is missing, and the way out."""

import pytest
from diffusers import StableDiffusion3Pipeline

from diffalign.backends import diffusers, table
from diffalign.backends.recorder import unfit
from diffalign.errors import UserError
from diffalign.models import loading
from diffalign.processes import PROCESSES
from diffalign.runs import parts
from tests.kit.helpers import tiny_config

CALL = {"max_sequence_length": 1}


class OwnStart(StableDiffusion3Pipeline):
    """Draws its start itself."""

    def __call__(self, prompt, num_inference_steps=3, generator=None, output_type="pil", **more):
        latents = super().prepare_latents(1, 4, 64, 64, self.transformer.dtype, "cpu", generator)
        self.scheduler.set_timesteps(num_inference_steps)
        return (latents,)


class OwnTimes(StableDiffusion3Pipeline):
    """Never tells its scheduler how many steps there are."""

    def __call__(self, prompt, num_inference_steps=3, generator=None, output_type="pil", **more):
        return (self.prepare_latents(len(prompt), 4, 64, 64, self.transformer.dtype, "cpu", generator),)


class Twice(StableDiffusion3Pipeline):
    """Asks its scheduler twice a timestep, as second-order loops do."""

    calls = 2

    def __call__(self, prompt, num_inference_steps=3, generator=None, output_type="pil", **more):
        latents = self.prepare_latents(len(prompt), 4, 64, 64, self.transformer.dtype, "cpu", generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for time in self.scheduler.timesteps:
            for _ in range(self.calls):
                latents = self.scheduler.step(latents, time, latents, return_dict=False)[0]
        return (latents,)


class Never(Twice):
    """Goes its own way between the timesteps."""

    calls = 0


class NoPrompt(StableDiffusion3Pipeline):
    """Takes embeddings alone."""

    def __call__(self, image_embeds, num_inference_steps=3, generator=None, output_type="pil"):
        return (image_embeds,)


def made(kind):
    pipe, _ = loading.load("shapes-sd3")
    pipe.__class__ = kind
    return diffusers.DiffusersPolicy(pipe, PROCESSES["flow_sde"], steps=3, call=CALL)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (OwnStart, "its call does not use its prepare_latents"),
        (OwnTimes, "its call does not set its scheduler's timesteps"),
        (NoPrompt, "its call has no prompt"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_sampled(kind, why):
    with pytest.raises(
        UserError, match=rf"model: its {kind.__name__} cannot be trained .*{why}; allowed are pipelines"
    ):
        made(kind)


@pytest.mark.parametrize(
    ("kind", "why"),
    [(Twice, "scheduler.step more than once a timestep"), (Never, "scheduler.step 0 times for 1 timesteps")],
)
def test_a_loop_of_another_form_is_told_before_the_first_sample(kind, why):
    with pytest.raises(UserError, match=why):
        made(kind)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda pipe: setattr(pipe, "transformer", None), "no denoiser under the names transformer"),
        (lambda pipe: setattr(pipe, "scheduler", None), "it has no scheduler"),
    ],
)
def test_parts_that_are_not_there_are_named(change, why):
    pipe, _ = loading.load("shapes-sd3")
    assert not unfit(pipe)
    change(pipe)
    assert any(why in line for line in unfit(pipe))


def test_a_class_in_the_table_has_its_own_policy(tmp_path, monkeypatch):
    monkeypatch.setitem(table.BACKENDS, "StableDiffusion3Pipeline", f"{__name__}:Own")
    assert type(parts.build(tiny_config(tmp_path)).policy) is Own


class Own(diffusers.DiffusersPolicy):
    """An override."""
