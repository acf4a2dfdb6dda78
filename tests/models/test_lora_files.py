"""Adapters that go on from others, and what ComfyUI would make of the exported file."""

import pytest
import torch
from click.testing import CliRunner
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from diffalign import config
from diffalign.cli import app
from diffalign.errors import UserError
from diffalign.models import lora as adapters
from diffalign.models import lora_files
from diffalign.models.notes import Notes
from diffalign.runs import session
from diffalign.types import Plan
from tests.families import FAMILIES, build, folder
from tests.families.probe import given, policy
from tests.kit.helpers import comfyui, tiny_config

READ = ["SD 1.5", "SDXL", "SD 3.5 Medium", "FLUX.1-dev", "Qwen-Image", "Z-Image"]


def saved(name: str, place):
    """A family's policy with a LoRA that has moved, and its adapter in a folder as a run leaves it."""
    made = policy(name)
    names = [type(module).__name__ for module in adapters.denoisers(made.pipe).values()]
    lora_files.save(made.pipe, place, Notes(denoisers=names).written())
    return made


def end(made) -> torch.Tensor:

    return made.rollout(given(), Plan.deterministic(4)).x[-1]


@pytest.mark.parametrize("name", ["SD 1.5", "FLUX.1-dev", "Wan 2.2"])
@pytest.mark.parametrize(("rank", "alpha"), [(4, 8.0), (4, 2.0), (6, 8.0)])
def test_going_on_from_an_adapter_begins_with_its_effect(name, rank, alpha, tmp_path):
    wanted = end(saved(name, tmp_path))
    from diffalign.backends.diffusers import DiffusersPolicy
    from diffalign.processes import PROCESSES

    pipe = build(name)
    trained = adapters.attach(pipe, rank, alpha, None, 1)
    lora_files.go_on_from(pipe, tmp_path)
    assert all(p.requires_grad for p in trained.values())
    family = FAMILIES[name]
    call = {k: v for k, v in family.call.items() if k != "negative_prompt"} | {family.guide: 0.0}
    again = DiffusersPolicy(
        pipe, PROCESSES[family.process], steps=4, guidance_scale=None, call=call, micro_batch=2, parameters=trained
    )
    # float32, the scale moved from one factor to another
    torch.testing.assert_close(end(again), wanted, rtol=1e-4, atol=1e-5)
    with again.reference():
        assert not torch.allclose(end(again), wanted, rtol=1e-3, atol=1e-4)


def test_an_adapter_that_does_not_fit_is_refused(tmp_path):
    saved("SD 1.5", tmp_path)
    pipe = build("SD 1.5")
    adapters.attach(pipe, 2, 2.0, None, 0)
    with pytest.raises(ValueError, match="its rank is 4, lora.rank is 2; allowed is lora.rank=4 or more"):
        lora_files.go_on_from(pipe, tmp_path)
    assert pipe.get_list_adapters() == {"unet": ["default"]}
    pipe = build("SD 1.5")
    adapters.attach(pipe, 4, 2.0, ["to_q"], 0)
    with pytest.raises(ValueError, match="which is not among lora.targets"):
        lora_files.go_on_from(pipe, tmp_path)


def test_a_run_goes_on_from_another(tmp_path):
    short = ("evaluation.enabled=false", "rewards={jpeg_compressibility: 1.0}")
    session.train(tiny_config(tmp_path / "one", "optimizer.lr=1e-2", *short), quiet=True)
    settings = tiny_config(tmp_path / "two", f"lora.start={tmp_path / 'one'}", "optimizer.lr=1e-6", *short)
    session.train(settings, quiet=True)
    one, two = (load_file(tmp_path / name / "adapter" / "pytorch_lora_weights.safetensors") for name in ("one", "two"))
    far = max(float(one[key].abs().max()) for key in one if "lora_B" in key)
    moved = max(float((one[key] - two[key]).abs().max()) for key in one if "lora_B" in key)
    # two steps of AdamW, from where the first run ended
    assert 0 < moved < 5e-6 < far
    with pytest.raises(UserError, match=r"lora.start: got '.*nowhere', no pytorch_lora_weights.safetensors there"):
        tiny_config(tmp_path / "three", f"lora.start={tmp_path / 'nowhere'}")


def merged(file, prefix) -> dict[str, torch.Tensor]:
    """What ComfyUI adds to every weight: alpha / rank * up @ down, 1 without an alpha, by its names without the prefix
    (comfy/weight_adapter/lora.py)."""
    tensors = load_file(file)
    up, down = ("lora_up", "lora_down") if prefix == "lora_unet_" else ("lora_B", "lora_A")
    found = {}
    for layer in {key.removesuffix(f".{up}.weight") for key in tensors if key.endswith(f".{up}.weight")}:
        b, a = tensors[f"{layer}.{up}.weight"], tensors[f"{layer}.{down}.weight"]
        scale = tensors[f"{layer}.alpha"] / len(a) if f"{layer}.alpha" in tensors else 1.0
        found[layer.removeprefix(prefix)] = scale * (b.flatten(1) @ a.flatten(1))
    return found


@pytest.mark.parametrize("name", READ)
def test_comfyui_adds_what_diffusers_adds(name, tmp_path):
    saved(name, tmp_path)
    done = CliRunner().invoke(app, ["export", str(tmp_path), "--out", str(tmp_path / "comfy.safetensors")])
    assert done.exit_code == 0, done.output
    pipe = DiffusionPipeline.from_pretrained(folder(name))
    (component, module), *_ = adapters.denoisers(pipe).items()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    pipe.load_lora_weights(tmp_path)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    after = getattr(pipe, component).state_dict()
    changed = {k.removesuffix(".weight"): after[k] - before[k] for k in before if not torch.equal(after[k], before[k])}
    prefix = "lora_unet_" if component == "unet" else "transformer."
    found = merged(tmp_path / "comfy.safetensors", prefix)
    if component == "unet":
        changed = {key.replace(".", "_"): value for key, value in changed.items()}
    assert changed.keys() <= found.keys()
    assert len(changed) > 5
    for key, value in changed.items():
        torch.testing.assert_close(found[key], value.flatten(1), rtol=1e-3, atol=1e-6)


def test_what_comfyui_cannot_read_is_refused(tmp_path):
    saved("Sana", tmp_path)
    with pytest.raises(UserError, match="export: got SanaTransformer2DModel; ComfyUI's names are known here for"):
        comfyui(tmp_path, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="--out: got .*allowed is a .safetensors file"):
        comfyui(tmp_path, tmp_path / "x.pt")
    with pytest.raises(UserError, match="no pytorch_lora_weights.safetensors there"):
        comfyui(tmp_path / "nothing", tmp_path / "x.safetensors")


def test_a_run_says_its_denoisers(tmp_path):
    session.train(tiny_config(tmp_path / "run", "evaluation.enabled=false", "updates=1"), quiet=True)
    assert Notes.read(tmp_path / "run" / "adapter").denoisers == ["SD3Transformer2DModel"]
    assert comfyui(tmp_path / "run", tmp_path / "x.safetensors")[tmp_path / "x.safetensors"] > 10
    assert config.load("flow_grpo/shapes-sd3").lora.start is None


def test_an_adapter_of_another_model_is_not_gone_on_from(tmp_path):
    """FLUX's double blocks have the names of Stable Diffusion 3's: part of it would load, silently."""
    saved("FLUX.1-dev", tmp_path / "flux")
    pipe = build("SD 3.5 Medium")
    adapters.attach(pipe, 4, 8.0, None, 0)
    with pytest.raises(
        ValueError, match=r"pytorch_lora_weights.safetensors has \d+ layers, this model's transformer has \d+"
    ):
        lora_files.go_on_from(pipe, tmp_path / "flux")
    made = policy("FLUX.1-dev")
    lora_files.save(made.pipe, tmp_path / "named", Notes(base_model="shapes-flux").written())
    with pytest.raises(UserError, match=r"lora.start: .*named belongs to shapes-flux, the run's model is shapes-sd3"):
        tiny_config(tmp_path / "run", f"lora.start={tmp_path / 'named'}")
    (tmp_path / "named" / "pytorch_lora_weights.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"lora.start: .*named holds a damaged adapter"):
        tiny_config(tmp_path / "run", f"lora.start={tmp_path / 'named'}")


def test_an_export_never_replaces_what_it_is_made_from(tmp_path):
    saved("SD 1.5", tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    before = file.read_bytes()
    with pytest.raises(UserError, match="which is the adapter itself; name another file"):
        comfyui(tmp_path, file)
    assert file.read_bytes() == before
    (tmp_path / "way").write_text("")
    with pytest.raises(UserError, match="--out: got .*cannot write there"):
        comfyui(tmp_path, tmp_path / "way" / "x.safetensors")


@pytest.mark.parametrize("name", ["Wan 2.1", "Wan 2.2", "LTX-Video"])
def test_layers_of_video_models_have_their_authors_names(name, tmp_path):
    """diffusers' own reader of the authors' files turns them back."""
    from diffusers.loaders import single_file_utils as own

    saved(name, tmp_path)
    found = comfyui(tmp_path, tmp_path / "comfy.safetensors")
    endings = ["", ".transformer_2"] if name == "Wan 2.2" else [""]
    assert [path.name for path in found] == [f"comfy{ending}.safetensors" for ending in endings]
    turn = (
        own.convert_ltx_transformer_checkpoint_to_diffusers
        if "LTX" in name
        else own.convert_wan_transformer_to_diffusers
    )
    for path, ending in zip(found, endings, strict=True):
        ours = load_file(tmp_path / f"pytorch_lora_weights{ending}.safetensors")
        theirs = load_file(path)
        written = {key: value for key, value in theirs.items() if key.endswith(".lora_A.weight")}
        named = {"model." + key.replace(".lora_A.weight", ".weight"): value for key, value in written.items()}
        assert len(named) == found[path] > 5
        back = turn(dict(named))
        expected = {
            key.removeprefix("transformer.").replace(".lora_A.weight", ".weight"): value
            for key, value in ours.items()
            if "lora_A" in key
        }
        assert back.keys() == expected.keys()
        assert all(torch.equal(back[key], expected[key]) for key in back)
