"""A run with guidance on some steps: goes on bit for bit, its adapter says so, and other commands draw what its evaluation drew."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffalign import config as configs
from diffalign.errors import UserError
from diffalign.models.notes import LORA, Notes
from diffalign.planning.cost import count
from diffalign.prompts import book
from diffalign.runs import parts, session
from diffalign.sampling import calling, sources
from diffalign.types import Plan
from tests.kit.helpers import tiny_config

GUIDED = ["sampler.guidance_scale=3", "sampler.guidance_steps=[1, 2]", "evaluation.enabled=false", "lora.rank=4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guided") / "run"
    session.train(tiny_config(folder, *GUIDED), quiet=True)
    return folder


def test_a_run_goes_on_bit_for_bit(run, tmp_path):
    for updates in (1, 2):
        session.train(tiny_config(tmp_path / "run", *GUIDED, f"updates={updates}"), quiet=True)
    whole, again = (load_file(folder / "adapter" / LORA) for folder in (run, tmp_path / "run"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_its_adapter_says_so_and_is_drawn_as_it_was_evaluated(run):
    assert Notes.read(run / "adapter").guidance_steps == [1, 2]
    assert "guidance on steps [1, 2) alone" in (run / "adapter" / "README.md").read_text()
    source = sources.resolve(str(run))
    assert source.call["guidance_steps"] == [1, 2]
    pipe = sources.pipeline(source)
    drawn = calling.drawer(pipe, source)(["two stars", "a red circle"], [5, 6])
    settings = configs.load(str(run / "config.yaml"))
    policy = parts.policy(settings, pipe)
    batch = book.fixed([{"prompt": "two stars"}, {"prompt": "a red circle"}], 1, 0)
    batch.seed[:] = [5, 6]
    with torch.no_grad():
        part = policy.rollout(batch, Plan.deterministic(3))
        expected = policy.decode(part, part.x[-1]).pixels[:, 0].permute(0, 2, 3, 1).numpy()
    assert policy.rows_forward == 2 * (1 + 2 + 1)
    # The scheduler's step is x + dt v where ours is a table's a x + b v: the last bits.
    np.testing.assert_allclose(drawn, expected, rtol=0, atol=1e-5)
    plain = calling.drawer(pipe, sources.with_options(source, ["guidance_steps=null"]))(["two stars"], [5])
    assert np.abs(plain[0] - drawn[0]).max() > 1e-3


def test_steps_that_do_not_fit_are_refused(run):
    source = sources.resolve(str(run))
    for given in ("[2, 1]", "[0, 4]", "3"):
        with pytest.raises(UserError, match="guidance_steps: got .* with 3 steps; allowed are"):
            calling.drawer(None, sources.with_options(source, [f"guidance_steps={given}"]))


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ("sampler.guidance_steps=[2, 1]", "got \\[2, 1\\], allowed are the first step with guidance"),
        ("sampler.guidance_steps=[0, 4]", "got \\[0, 4\\], allowed are the first step with guidance"),
        ("prompts.cache=kept", "with prompts.cache"),
        ("sampler.pipeline_args={skip_guidance_layers: [1]}", "with skip_guidance_layers in sampler.pipeline_args"),
    ],
)
def test_what_cannot_go_together_is_refused(more, why, tmp_path):
    with pytest.raises(UserError, match=f"sampler.guidance_steps: got .*{why}|sampler.guidance_steps: {why}"):
        tiny_config(tmp_path / "run", *GUIDED, more)


def test_a_plan_says_what_it_saves(tmp_path):
    """Of 4 samples, each 3 steps, and a term on the two noisy ones of each, [1, 2) leaves 4 + 8 + 4 and 4 + 8 rows of 24 and 16."""
    some = count(tiny_config(tmp_path / "run", *GUIDED))
    whole = count(tiny_config(tmp_path / "run", GUIDED[0]))
    assert whole.rows_forward == 24 + 16
    assert some.rows_forward == 16 + 12
    assert some.rows_backward == 12
    assert any("guidance on 1 of 3 steps, 28 rows forward instead of 40: 30 % fewer" in note for note in some.notes)


@pytest.mark.slow
def test_a_plan_refuses_embedded_guidance_by_name(tmp_path):
    with pytest.raises(UserError, match="sampler.guidance_steps: .*FLUX.1-dev predicts once a step"):
        count(
            configs.load(
                "flow_grpo/flux-dev",
                [
                    "sampler.guidance_steps=[0, 3]",
                    "prompts.cache=null",
                    f"run_dir={tmp_path}",
                    "rewards={jpeg_compressibility: 1}",
                ],
            )
        )
