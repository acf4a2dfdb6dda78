"""Names that are not diffusers': a U-Net's blocks counted through, and XLabs' FLUX; held against the tests' own writer of such files and
diffusers' converters."""

import torch
from diffusers.loaders import lora_conversion_utils as converters
from safetensors.torch import save_file

from diffalign.models import lora_normal, lora_pairs
from diffalign.models.layer_names import unet_blocks
from tests.families import build, single_file


def weights(module):
    """Of a module's linear layers and convolutions, by name."""
    found = {name: getattr(layer, "weight", None) for name, layer in module.named_modules()}
    return {name: weight for name, weight in found.items() if weight is not None and weight.ndim > 1}


def test_every_layer_of_a_u_net_has_the_number_that_its_authors_give_it():
    """By the weights themselves, which are all different."""
    unet = build("SD 1.5").unet
    held = {
        key.removeprefix("model.diffusion_model.").removesuffix(".weight"): value
        for key, value in single_file.unet(unet).items()
        if key.endswith(".weight") and value.ndim > 1
    }
    own = weights(unet)
    table = unet_blocks(own.keys())
    assert held.keys() == table.keys() and set(table.values()) == own.keys()
    assert all(torch.equal(held[theirs], own[ours]) for theirs, ours in table.items())


def halves(names, own):
    """A LoRA of rank 2 for some layers, under names of other tools."""
    made, generator = {}, torch.Generator().manual_seed(0)
    for theirs, layer in names.items():
        weight = own[layer]
        made[f"{theirs}.lora_down.weight"] = torch.randn(2, *weight.shape[1:], generator=generator)
        made[f"{theirs}.lora_up.weight"] = torch.randn(len(weight), 2, *[1] * (weight.ndim - 2), generator=generator)
        made[f"{theirs}.alpha"] = torch.tensor(1.0)
    return made


def test_l6_sdxl_by_its_authors_numbers_and_by_diffusers_is_the_same(tmp_path):
    """diffusers' own reader of such files finds the same layers."""
    unet = build("SDXL").unet
    own = weights(unet)
    attention = {theirs: ours for theirs, ours in unet_blocks(own.keys()).items() if "attn" in ours or "ff.net" in ours}
    assert len(attention) > 20
    tensors = halves({f"lora_unet_{theirs.replace('.', '_')}": ours for theirs, ours in attention.items()}, own)
    save_file(tensors, tmp_path / "theirs.safetensors")
    found = lora_pairs.fitting(unet, tmp_path / "theirs.safetensors")
    assert found.keys() == set(attention.values())
    same = halves({f"lora_unet_{ours.replace('.', '_')}": ours for ours in attention.values()}, own)
    save_file(same, tmp_path / "ours.safetensors")
    other = lora_pairs.fitting(unet, tmp_path / "ours.safetensors")
    assert all(torch.equal(found[layer].up, other[layer].up) for layer in other)
    mapped = converters._maybe_map_sgm_blocks_to_diffusers(dict(tensors), unet.config)
    read, alphas = converters._convert_non_diffusers_lora_to_diffusers(mapped)
    products = {}
    for key in read:
        if key.endswith("down.weight"):
            stem = key.removesuffix(".down.weight").removesuffix("_lora").removesuffix(".lora")
            stem = stem.removeprefix("unet.").replace(".processor.", ".")
            stem = stem + ".0" if stem.endswith("to_out") else stem
            products[stem] = read[key.replace("down.weight", "up.weight")] @ read[key]
    assert products.keys() == found.keys()
    assert all(torch.equal(products[layer], pair.up @ pair.down) for layer, pair in found.items())


def test_xlabs_flux_is_read_as_diffusers_reads_it(tmp_path):
    flux = build("FLUX.1-dev").transformer
    size, generator, tensors = (
        flux.transformer_blocks[0].attn.to_q.weight.shape[0],
        torch.Generator().manual_seed(0),
        {},
    )
    for number in range(len(flux.transformer_blocks)):
        for name, out in (("qkv_lora1", 3 * size), ("qkv_lora2", 3 * size), ("proj_lora1", size), ("proj_lora2", size)):
            stem = f"double_blocks.{number}.processor.{name}"
            tensors[f"{stem}.down.weight"] = torch.randn(2, size, generator=generator)
            tensors[f"{stem}.up.weight"] = torch.randn(out, 2, generator=generator)
    save_file(tensors, tmp_path / "x.safetensors")
    found = lora_normal.dotted(lora_pairs.fitting(flux, tmp_path / "x.safetensors"), "transformer.")
    wanted = converters._convert_xlabs_flux_lora_to_diffusers(dict(tensors))
    assert found.keys() == wanted.keys() and len(found) == 2 * 8 * len(flux.transformer_blocks)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
