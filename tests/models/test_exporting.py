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
from diffalign.models import exporting, lora, lora_files, lora_normal
from diffalign.models.layer_names import COMFYUI, KOHYA
from diffalign.models.lora_normal import Pair
from diffalign.models.notes import LORA, Notes
from diffalign.models.places import Adapter
from tests.families import FAMILIES, build, folder
from tests.families.probe import policy

FORMATS = {"comfyui": COMFYUI, "kohya": KOHYA, "diffusers": None, "peft": None}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A family's adapter in a folder as a run leaves it, and peft's difference of every layer's weight; by the family's name."""
    known = {}

    def of(name):
        if name not in known:
            place = tmp_path_factory.mktemp("family")
            own = policy(name)
            modules = lora.denoisers(own.pipe)
            notes = Notes(base_model="owner/name", denoisers=[type(m).__name__ for m in modules.values()])
            lora_files.save(own.pipe, place, notes.written())
            wanted = {
                component: {layer: part.get_delta_weight("default") for layer, part in lora_files.layers(module)}
                for component, module in modules.items()
            }
            known[name] = place, wanted, notes.denoisers[0]
        return known[name]

    return of


def read(path, pipe, component):
    """Differences of weights that a file stands for, by diffusers' names."""
    weights = {n: getattr(m, "weight", None) for n, m in getattr(pipe, component).named_modules()}
    sizes = {n: len(w) for n, w in weights.items() if isinstance(w, torch.Tensor) and w.ndim > 1}
    pairs = lora_normal.read(path, sizes)
    return {layer: pair.scale * (pair.up.flatten(1) @ pair.down.flatten(1)) for layer, pair in pairs.items()}


def apart(found, wanted):
    """Largest difference over a layer's largest number; layers that a joined one adds with nothing in them are zero."""
    missing = wanted.keys() - found.keys()
    assert not missing, missing
    worst = 0.0
    for layer, difference in found.items():
        other = wanted[layer].flatten(1) if layer in wanted else torch.zeros_like(difference)
        worst = max(worst, float((difference - other).abs().max() / max(float(other.abs().max()), 1e-3)))
    return worst


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", FAMILIES)
def test_l22_l23_what_is_exported_is_read_back_as_it_was(name, form, made, tmp_path):
    place, wanted, denoiser = made(name)
    table, several = FORMATS[form], len(wanted) > 1
    out = tmp_path / ("peft" if form == "peft" else "out.safetensors")
    if table is not None and denoiser not in table:
        with pytest.raises(UserError, match=f"export: got {denoiser}; .* names are known here for"):
            exporting.export([Adapter(place)], out, form)
        return
    if form == "peft" and several:
        with pytest.raises(UserError, match="--format: got peft, this model has 2 denoisers"):
            exporting.export([Adapter(place)], out, form)
        return
    files = exporting.export([Adapter(place)], out, form)
    pipe = build(name)
    for written, (component, differences) in zip(files, wanted.items(), strict=True):
        assert (
            apart(read(written.path, pipe, component), differences) <= 1e-5
        )  # float32: a rounding of the scale, one of the sum


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
    with pytest.raises(UserError, match="export: got .*nothing.*allowed is FOLDER"):
        CliRunner().invoke(app, ["export", str(tmp_path / "nothing"), "--out", str(out)], catch_exceptions=False)
