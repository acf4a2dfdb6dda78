"""What is exported acts as the adapter does, whatever the tool's names: every family, every format, read back by our reader and held
against peft's own differences of weights."""

import json

import pytest
import torch
from click.testing import CliRunner
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from diffalign.cli import app
from diffalign.errors import UserError
from diffalign.models import exporting, lora_files, lora_pairs
from diffalign.models.layer_names import COMFYUI, KOHYA
from diffalign.models.lora_normal import Pair
from diffalign.models.notes import LORA, Notes
from diffalign.models.places import Adapter, given
from tests.families import FAMILIES, build, folder
from tests.families.lora_table import adapter, apart

KNOWN = {"comfyui": COMFYUI, "kohya": KOHYA}


@pytest.fixture
def made():
    return adapter


@pytest.mark.parametrize("form", exporting.FORMATS)
@pytest.mark.parametrize("name", FAMILIES)
def test_l22_l23_what_is_exported_is_read_back_as_it_was(name, form, tmp_path):
    _, wanted, denoiser = adapter(name)
    if form in KNOWN and denoiser not in KNOWN[form]:
        with pytest.raises(UserError, match=f"export: got {denoiser}; .* names are known here for"):
            apart(name, form, tmp_path)
    elif form == "peft" and len(wanted) > 1:
        with pytest.raises(UserError, match="--format: got peft, this model has 2 denoisers"):
            apart(name, form, tmp_path)
    else:
        assert apart(name, form, tmp_path) <= 1e-6  # float32: the scale times B is rounded once


@pytest.mark.parametrize("name", ["SD 1.5", "SD 3.5 Medium", "FLUX.1-dev", "Qwen-Image", "LTX-Video"])
def test_l22_comfyuis_file_loads_in_diffusers(name, made, tmp_path):
    place, wanted, _ = made(name)
    exporting.export([Adapter(place)], tmp_path / LORA, "comfyui")
    pipe = DiffusionPipeline.from_pretrained(folder(name))
    pipe.load_lora_weights(tmp_path)
    for component, differences in wanted.items():
        layers = dict(lora_files.layers(getattr(pipe, component), "default_0"))
        assert layers.keys() == differences.keys()
        for layer, difference in differences.items():
            torch.testing.assert_close(layers[layer].get_delta_weight("default_0"), difference, rtol=1e-4, atol=1e-6)


READERS = [
    *[(name, "kohya") for name in ("SD 1.5", "SDXL", "Qwen-Image", "FLUX.2-dev", "FLUX.2-klein", "Z-Image", "Wan 2.1")],
    *[(name, "comfyui") for name in ("FLUX.2-dev", "Z-Image", "Wan 2.1")],
]


@pytest.mark.parametrize(("name", "form"), READERS)
def test_diffusers_own_converters_read_the_same_of_others_names(name, form, tmp_path):
    """Where they are right: they have none for Stable Diffusion 3 and HunyuanVideo, and FLUX.1's insists on its full width."""
    place, wanted, _ = adapter(name)
    exporting.export([Adapter(place)], tmp_path / LORA, form)
    pipe = DiffusionPipeline.from_pretrained(folder(name))
    pipe.load_lora_weights(tmp_path)
    for component, differences in wanted.items():
        layers = dict(lora_files.layers(getattr(pipe, component), "default_0"))
        for layer, difference in differences.items():
            torch.testing.assert_close(layers[layer].get_delta_weight("default_0"), difference, rtol=1e-4, atol=1e-6)


def pair(rank, outputs, inputs=6, scale=1.0, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return Pair(torch.randn(rank, inputs, generator=draw), torch.randn(outputs, rank, generator=draw), scale)


def product(given):
    return given.scale * given.up @ given.down


def test_l25_layers_of_different_ranks_become_one():
    parts = [pair(2, 4, scale=0.5), None, pair(3, 4, seed=1)]
    whole = exporting.put_together(parts, [4, 4, 8 - 4])
    assert whole.rank == 5
    torch.testing.assert_close(product(whole), torch.cat([product(parts[0]), torch.zeros(4, 6), product(parts[2])]))


def test_l32_adapters_add_up():
    a, b = {"x": pair(2, 5, scale=0.5)}, {"x": pair(3, 5, seed=1), "y": pair(1, 5, seed=2)}
    total = exporting.added([(a, 0.8), (b, -1.0)])
    torch.testing.assert_close(product(total["x"]), 0.8 * product(a["x"]) - product(b["x"]))
    torch.testing.assert_close(product(total["y"]), -product(b["y"]))
    half = exporting.added([(a, 0.5), (a, 0.5)])
    torch.testing.assert_close(product(half["x"]), product(a["x"]))


def test_l34_a_lower_rank_is_the_nearest_there_is():
    given = {"x": pair(4, 7, scale=0.5)}
    same, lost = exporting.lowered(given, 4)
    torch.testing.assert_close(product(same["x"]), product(given["x"]), rtol=1e-5, atol=1e-6)
    assert lost < 1e-6
    few, lost = exporting.lowered(given, 1)
    whole = product(given["x"])
    u, s, v = torch.linalg.svd(whole.double())
    torch.testing.assert_close(product(few["x"]).double(), s[0] * torch.outer(u[:, 0], v[0]), rtol=1e-4, atol=1e-5)
    assert lost == pytest.approx(float((whole - product(few["x"])).norm() / whole.norm()), rel=1e-4)


def test_l24_half_precision_is_rounded_once(made, tmp_path):
    place, _, _ = made("SD 3.5 Medium")
    full, half = ({}, {})
    for dtype, found in (("float32", full), ("bfloat16", half)):
        exporting.export([Adapter(place, 0.3)], tmp_path / f"{dtype}.safetensors", "comfyui", dtype)
        found.update(load_file(tmp_path / f"{dtype}.safetensors"))
    assert all(torch.equal(half[key], full[key].to(torch.bfloat16)) for key in full)


def test_l26_the_file_says_what_it_is_and_nothing_of_this_machine(tmp_path, made):
    place, _, _ = made("SD 1.5")
    notes = Notes(
        base_model=str(tmp_path / "home" / "model"),
        denoisers=["UNet2DConditionModel"],
        rule={"name": "ddpo"},
        rewards={f"{tmp_path}/mine.py:score": 1.0},
        call={"height": 512, "width": 768},
    )
    raw = load_file(place / LORA)
    with safe_open(place / LORA, "pt") as file:
        settings = file.metadata()["lora_adapter_metadata"]
    from safetensors.torch import save_file

    (tmp_path / "own").mkdir()
    save_file(raw, tmp_path / "own" / LORA, metadata={**notes.written(), "lora_adapter_metadata": settings})
    exporting.export([Adapter(tmp_path / "own")], tmp_path / "out.safetensors", "kohya")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        told = file.metadata()
    assert all(isinstance(value, str) for value in told.values())
    assert str(tmp_path) not in json.dumps(told)
    assert told["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert told["modelspec.sai_model_spec"] == "1.0.1"
    assert told["modelspec.resolution"] == "768x512"
    assert told["ss_base_model_version"] == "sd_1.5"
    assert told["ss_network_dim"] == told["ss_network_alpha"] == "4"
    assert json.loads(told["rewards"]) == {"mine.py:score": 1.0}


def test_pefts_folder_is_one_that_peft_loads(made, tmp_path):
    from peft import PeftModel

    place, wanted, _ = made("SD 3.5 Medium")
    exporting.export([Adapter(place)], tmp_path / "peft", "peft")
    pipe = build("SD 3.5 Medium")
    model = PeftModel.from_pretrained(pipe.transformer, tmp_path / "peft")
    layers = dict(lora_files.layers(model.base_model.model))
    assert layers.keys() == wanted["transformer"].keys()
    for layer, difference in wanted["transformer"].items():
        torch.testing.assert_close(layers[layer].get_delta_weight("default"), difference, rtol=1e-4, atol=1e-6)


def test_the_command_says_what_it_wrote_and_what_a_lower_rank_lost(made, tmp_path):
    place, _, _ = made("SD 3.5 Medium")
    out = tmp_path / "x.safetensors"
    done = CliRunner().invoke(
        app, ["export", str(place), "--rank", "1", "--adapter", f"{place}:-0.5", "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    assert done.output.startswith(f"{out}: ") and "% of the difference lost" in done.output
    other, *_ = made("FLUX.1-dev")
    with pytest.raises(UserError, match="--adapter: they belong to .*allowed is one model's"):
        exporting.export([Adapter(place), Adapter(other)], out)
    with pytest.raises(UserError, match="export: got .*nothing.*allowed is a run.s or adapter.s folder"):
        CliRunner().invoke(app, ["export", str(tmp_path / "nothing"), "--out", str(out)], catch_exceptions=False)


def changed(place, out, change, settings=None):
    """An adapter's file with other tensors, or other settings."""
    from safetensors.torch import save_file

    tensors = {key: change(key, value) for key, value in load_file(place / LORA).items()}
    metadata = {} if settings is None else {"lora_adapter_metadata": json.dumps(settings)}
    save_file(tensors, out, metadata=metadata)
    return out


@pytest.mark.parametrize(
    ("change", "settings", "said"),
    [
        (lambda k, v: v.to(torch.float8_e4m3fn), None, "holds torch.float8_e4m3fn, allowed are float16"),
        (lambda k, v: v[:0] if "lora_A" in k else v[:, :0], None, "has a rank of 0"),
        (lambda k, v: v[:, :-1].contiguous() if "lora_A" in k else v, None, r"takes \(\d+,\) in it, in this model"),
        (lambda k, v: v, {"transformer.use_dora": True}, "it is a DoRA.*its settings say use_dora"),
    ],
)
def test_what_a_layer_has_no_place_for_is_named(change, settings, said, tmp_path):
    place, *_ = adapter("SD 3.5 Medium")
    file = changed(place, tmp_path / "hers.safetensors", change, settings)
    with pytest.raises(ValueError, match=said):
        lora_pairs.pairs(build("SD 3.5 Medium"), file)


def test_a_folder_that_holds_something_is_not_written_into(tmp_path):
    place, *_ = adapter("SD 3.5 Medium")
    (tmp_path / "adapter_config.json").write_text("mine")
    with pytest.raises(UserError, match="--out: got .*which holds something; allowed is a new folder"):
        exporting.export([Adapter(place)], tmp_path, "peft")
    assert (tmp_path / "adapter_config.json").read_text() == "mine"


def test_an_empty_strength_is_no_strength():
    place, *_ = adapter("SD 3.5 Medium")
    with pytest.raises(UserError, match="allowed are PLACE and PLACE:STRENGTH, a number"):
        given(f"{place}:")
