"""Videos before rewards for pictures, and rewards for videos."""

import numpy as np
import pytest
import torch

from diffalign import config
from diffalign.errors import UserError
from diffalign.rewards.frames import PerFrame, chosen
from diffalign.rewards.load import load
from diffalign.types import Media, Prompts


def video(n=2, frames=5, size=8):
    pixels = torch.rand(n, frames, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    keys = np.arange(n)
    return Media(pixels), Prompts([str(k) for k in range(n)], keys, keys, keys, [{"k": k} for k in range(n)])


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("first", [0]),
        ("middle", [2]),
        ("all", [0, 1, 2, 3, 4]),
        ("uniform:3", [0, 2, 4]),
        ("uniform:1", [0]),
        ("uniform:9", [0, 1, 2, 3, 4]),
        ("first_latent", [0]),
    ],
)
def test_policies_choose_frames(policy, expected):
    assert chosen(policy, 5).tolist() == expected


@pytest.mark.parametrize("policy", ["last", "uniform", "uniform:0", "uniform:-1", ""])
def test_other_policies_are_refused(policy):
    with pytest.raises(ValueError, match="allowed are first, middle, all, uniform:N and first_latent"):
        chosen(policy, 5)
    with pytest.raises(UserError, match="scoring.frames"):
        config.load("flow_grpo/shapes-sd3", [f"scoring.frames='{policy}'"])


@pytest.mark.parametrize(("reduce", "how"), [("mean", torch.mean), ("min", torch.amin)])
def test_every_frame_is_scored_against_its_own_prompt_and_put_together(reduce, how):
    media, prompts = video()

    def reward(media, prompts):
        assert media.pixels.shape[1] == 1
        return media.pixels.flatten(1).mean(1) + torch.tensor([10.0 * m["k"] for m in prompts.metadata])

    found = PerFrame(reward, "uniform:3", reduce)(media, prompts)
    seen = media.pixels[:, [0, 2, 4]].flatten(2).mean(2)
    torch.testing.assert_close(found, how(seen, dim=1) + torch.tensor([0.0, 10.0]))


def test_lists_do_too_and_pictures_pass_through():
    media, prompts = video()
    found = PerFrame(lambda m, p: [float(x) for x in range(len(p))], "all", "mean")(media, prompts)
    assert found.tolist() == [2.0, 7.0]
    one = Media(media.pixels[:, :1])
    assert PerFrame(lambda m, p: [1.0, 2.0], "middle")(one, prompts) == [1.0, 2.0]


def test_built_in_rewards_for_pictures_see_the_frames_that_were_asked_for():
    media, prompts = video(size=16)
    parts = [load("jpeg_compressibility")(Media(media.pixels[:, k : k + 1]), prompts) for k in range(5)]
    assert load("jpeg_compressibility", frames="middle")(media, prompts).tolist() == parts[2]
    assert load("jpeg_compressibility")(media, prompts).tolist() == pytest.approx(np.mean(parts, 0).tolist())
    assert load("jpeg_compressibility").background


def test_motion_and_consistency_are_differences_of_frames():
    media, prompts = video()
    first = media.pixels[:, 1:] - media.pixels[:, :-1]
    second = first[:, 1:] - first[:, :-1]
    for name, steps, sign in (("motion", first, 1), ("temporal_consistency", second, -1)):
        expected = sign * steps.square().flatten(1).mean(1).sqrt()
        torch.testing.assert_close(load(name)(media, prompts), expected)
    with pytest.raises(ValueError, match="for videos of 2 and more"):
        load("motion")(Media(media.pixels[:, :1]), prompts)
    with pytest.raises(ValueError, match="for videos of 3 and more"):
        load("temporal_consistency")(Media(media.pixels[:, :2]), prompts)


@pytest.mark.parametrize("name", ["motion", "temporal_consistency"])
def test_their_gradient_is_that_of_finite_differences(name):
    media, prompts = video()
    reward = load(name)
    assert torch.autograd.gradcheck(
        lambda x: reward(Media(x), prompts), media.pixels[:1, :, :, :2, :2].clone().requires_grad_()
    )
    still = torch.full_like(media.pixels, 0.5).requires_grad_()
    (slope,) = torch.autograd.grad(reward(Media(still), prompts).sum(), still)
    assert slope.isfinite().all()
