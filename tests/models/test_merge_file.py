"""A single file merged into itself: what it holds besides stays, and what is read from it is the merged pipeline."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffalign.errors import UserError
from diffalign.models import loading, merging
from diffalign.models.places import Adapter
from diffalign.sampling import merged, sources
from tests.families import folder, single_file

UNET = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def halves(stem, out, inputs, *kernel):
    """A LoRA of rank 2 in kohya's names."""
    generator = torch.Generator().manual_seed(len(stem))
    return {
        f"{stem}.lora_down.weight": torch.randn(2, inputs, *kernel, generator=generator),
        f"{stem}.lora_up.weight": torch.randn(out, 2, *[1] * len(kernel), generator=generator),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_by_its_authors_names_is_merged_as_the_pipeline_is(dtype, tmp_path, monkeypatch):
    pipe, _ = loading.load(str(folder("SD 1.5")))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in [*pipe.unet.parameters(), *pipe.text_encoder.parameters()]:
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    parts = single_file.unet(pipe.unet), single_file.vae(pipe.vae), single_file.clip(pipe.text_encoder)
    held = {name: value.to(dtype).contiguous() for part in parts for name, value in part.items()}
    save_file(held, tmp_path / "base.safetensors", metadata={"modelspec.title": "hers"})
    names = dict(pipe.unet.named_modules())
    query = next(name for name in names if name.endswith("attn1.to_q"))
    conv = next(name for name in names if name.endswith("resnets.0.conv1"))
    encoder = next(name for name, _ in pipe.text_encoder.named_modules() if name.endswith("layers.0.self_attn.q_proj"))
    text = "lora_te_text_model_" + encoder.removeprefix("text_model.").replace(".", "_")
    file = {}
    for stem, layer in (
        ("lora_unet_" + query.replace(".", "_"), names[query]),
        ("lora_unet_" + conv.replace(".", "_"), names[conv]),
        (text, pipe.text_encoder.get_submodule(encoder)),
    ):
        file |= halves(stem, len(layer.weight), *layer.weight.shape[1:])
    save_file(file, tmp_path / "hers.safetensors")
    adapters = (Adapter(tmp_path / "hers.safetensors", 0.1),)
    source = sources.Source(str(folder("SD 1.5")), adapters, {}, weights=str(tmp_path / "base.safetensors"))
    monkeypatch.setattr(merged, "_source", lambda target, more: source)
    out = tmp_path / "merged.safetensors"
    assert merged.write("x", [], out)[0].endswith("with 1 adapter in 3 layers")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "base.safetensors",
        "hers.safetensors",
        "merged.safetensors",
    ]
    (tmp_path / "any").write_text("")
    assert out.stat().st_mode == (tmp_path / "any").stat().st_mode  # safetensors writes for the user alone
    found = load_file(out)
    assert found.keys() == held.keys() and {t.dtype for t in found.values()} == {t.dtype for t in held.values()}
    assert len([key for key in held if not torch.equal(found[key], held[key])]) == 3
    with safe_open(out, "pt") as opened:
        assert opened.metadata()["modelspec.title"] == "hers"
    wanted, _ = loading.load(str(folder("SD 1.5")), weights=str(tmp_path / "base.safetensors"))
    merging.merge(wanted, adapters)
    back, _ = loading.load(str(folder("SD 1.5")), weights=str(out))
    for part in ("unet", "text_encoder"):
        for key, value in getattr(back, part).state_dict().items():
            exact = getattr(wanted, part).state_dict()[key]
            assert torch.equal(value, exact.to(dtype).to(value.dtype)), key
    with pytest.raises(UserError, match="--out: got .*merged.safetensors', which holds something"):
        merged.write("x", [], out)


def test_layers_that_are_one_in_the_file(tmp_path):
    pipe, _ = loading.load("shapes-sd3")
    attention = pipe.transformer.transformer_blocks[0].attn
    own = [getattr(attention, name).weight for name in ("to_q", "to_k", "to_v")]
    held = {"model.qkv": torch.cat(own), "model.other": torch.ones(4, own[0].shape[1])}
    save_file(held, tmp_path / "base.safetensors")
    save_file(halves("transformer.transformer_blocks.0.attn.to_k", *own[1].shape), tmp_path / "hers.safetensors")
    adapters = [Adapter(tmp_path / "hers.safetensors")]
    merging.merge_file(pipe, adapters, tmp_path / "base.safetensors", tmp_path / "out.safetensors")
    merging.merge(pipe, adapters)
    found = load_file(tmp_path / "out.safetensors")
    assert torch.equal(found["model.qkv"], torch.cat(own)) and torch.equal(found["model.other"], held["model.other"])
    save_file(held | {"twice": own[1].clone()}, tmp_path / "other.safetensors")
    with pytest.raises(
        ValueError, match="layer transformer_blocks.0.attn.to_k of the transformer is in the file not as it was"
    ):
        merging.merge_file(pipe, adapters, tmp_path / "base.safetensors", tmp_path / "out.safetensors")
    save_file(held | {"one": own[1].clone(), "two": own[1].clone()}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is in the file 2 times; allowed is a folder"):
        merging.merge_file(pipe, adapters, tmp_path / "other.safetensors", tmp_path / "out.safetensors")


def test_a_base_that_is_a_folder_gives_no_file(tmp_path):
    save_file(halves(UNET, 4, 4), tmp_path / "hers.safetensors")
    with pytest.raises(UserError, match="shapes-sd is no single file, and diffusers writes none; allowed is a folder"):
        merged.write("shapes-sd", [str(tmp_path / "hers.safetensors")], tmp_path / "out.safetensors")
