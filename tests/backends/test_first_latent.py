"""`scoring.frames: first_latent`: the first frame by the first latent alone, and the gradient that leaves the others out."""

from __future__ import annotations

import pytest
import torch

from diffalign.errors import UserError
from diffalign.runs.introducing import introduce
from diffalign.runs.parts import build
from diffalign.runs.parts import policy as make_policy
from diffalign.types import Plan
from tests.families import build as pipeline
from tests.families.probe import given, policy
from tests.kit.helpers import tiny_config


def shapes_wan(tmp_path, *overrides: str):
    return tiny_config(tmp_path, "scoring.frames=first_latent", *overrides, name="flow_grpo/shapes-wan")


def subjects(tmp_path, checkpoint: str = "none"):
    """The embedded pipeline, whose decoder is trained, and one of random weights that has more latents."""
    parts = build(shapes_wan(tmp_path, f"memory.checkpoint={checkpoint}"), say=lambda line: None)
    batch = parts.policy.rollout(given(), Plan.deterministic(3))
    one = policy("Wan 2.1", one_latent=True, checkpoint=checkpoint)
    return (parts.policy, batch), (one, one.rollout(given(), Plan.deterministic(one.schedule.steps)))


def test_73_a_causal_decoder_makes_the_first_frame_of_the_first_latent(tmp_path):
    for one, part in subjects(tmp_path):
        whole, first = (one.decode(part, part.x[-1], whole=whole).pixels for whole in (True, False))
        assert whole.shape[1] > 1
        assert first.shape == (len(whole), 1, *whole.shape[2:])
        torch.testing.assert_close(first[:, 0], whole[:, 0], atol=1e-5, rtol=0)  # float32; kernels of fewer frames
        assert (whole[:, 1:] - whole[:, :1]).abs().max() > 1e-2
    assert torch.equal(policy("Wan 2.1").decode(part, part.x[-1]).pixels, whole)  # without it every decode is whole


@pytest.mark.parametrize("checkpoint", ["none", "both"])
def test_74_later_latents_get_no_gradient_and_the_first_gets_its_own(tmp_path, checkpoint):
    for one, part in subjects(tmp_path, checkpoint):
        slopes = []
        for whole in (False, True):
            x = part.x[-1].clone().requires_grad_()
            one.decode(part, x, whole=whole).pixels[:, 0].square().sum().backward()
            slopes.append(x.grad)
        assert x.shape[2] > 1
        assert torch.equal(slopes[0][:, :, 1:], torch.zeros_like(slopes[0][:, :, 1:]))
        size = float(slopes[0].abs().max())
        assert size > 1e-5
        torch.testing.assert_close(slopes[0], slopes[1], rtol=0, atol=1e-4 * size)  # float32, kernels of fewer frames


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("HunyuanVideo", "makes another first frame of its first latent alone than of all: pixels differ by 0"),
        ("LTX-Video", r"has latents of \(1, 192, 8\), for one frame .* not \(N, C, F, H, W\)"),
        ("SD 1.5", "makes no videos"),
    ],
)
def test_73_others_are_refused(name, why):
    with pytest.raises(
        UserError, match=f"scoring.frames: got first_latent, this {type(pipeline(name)).__name__} {why}"
    ):
        policy(name, one_latent=True)


def test_73_a_decoder_that_looks_ahead_is_refused_though_its_latents_are_laid_out_alike(tmp_path):
    config = shapes_wan(tmp_path)
    pipe = build(config, say=lambda line: None).pipe
    decode = pipe.vae.decode
    pipe.vae.decode = lambda z, **kwargs: decode(z + 0.05 * z.mean(2, keepdim=True), **kwargs)
    with pytest.raises(UserError, match="scoring.frames: got first_latent, .* pixels differ by"):
        make_policy(config, pipe)


def test_a_run_s_rewards_see_one_frame_and_those_of_motion_are_warned_of(tmp_path):
    config, said = shapes_wan(tmp_path), []
    parts = build(config, say=lambda line: None)
    introduce(config, parts, config.book.draw(2, 2, 0, 0), said.append)
    assert [
        line for line in said if line.startswith("scoring.frames: first_latent: shapes_motion_partial see one frame")
    ]
