"""`python -m tools.lora_readers kohya-ss/sd-scripts DIR [--commit HASH] [--write]`: our files, read by other tools' own code.

DIR is a checkout, whose packages are installed (sd-scripts: einops, toml). sd-scripts: small models of theirs of FLUX.1 and Stable
Diffusion 3.5, with random weights, take a kohya file of ours as their networks merge it; both states, before and after, go through
diffusers' converter of checkpoints, and every layer must have changed by exactly what the file's pairs say: nothing on the way there is
ours but the file. U-Nets: every name must be one that their networks have, on full-size models without weights.
lllyasviel/stable-diffusion-webui-forge: its copy of ComfyUI's reader, and ComfyUI's tables of where diffusers' layers are. --write keeps
what was found, with the commit and the files' hashes, in tools/lora_readers.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import save_file

from diffalign.models import exporting
from diffalign.models.layer_names import FLUX, SD3, unet_blocks
from diffalign.models.lora_normal import Pair

KEPT = Path(__file__).with_suffix(".json")
FILES = (
    "networks/lora.py",
    "networks/lora_flux.py",
    "networks/lora_sd3.py",
    "library/flux_models.py",
    "library/sd3_models.py",
)
WIDTH, BLOCKS = 128, 2  # of the small models
Weights = dict[str, torch.Tensor]


def pairs_for(table: dict[str, tuple[str, ...]], weights: Weights) -> dict[str, Pair]:
    """A LoRA on every layer that a table of names has, ranks and strengths differing, one layer in five left out."""
    generator, made = torch.Generator().manual_seed(1), {}
    ours = {name for several in table.values() for name in several}
    layers = [name.removesuffix(".weight") for name, weight in weights.items() if weight.ndim == 2]
    for k, layer in enumerate(layers):
        number = next((part for part in layer.split(".") if part.isdigit()), "")
        if layer.replace(f".{number}.", ".#.", 1) not in ours or k % 5 == 4:
            continue
        out, inside = weights[f"{layer}.weight"].shape
        rank = 2 + k % 3
        down, up = (torch.randn(*shape, generator=generator) for shape in ((rank, inside), (out, rank)))
        made[layer] = Pair(down, up, 0.25 * (1 + k % 4))
    return made


def read(kind: str, network: Any, model: Any, convert: Callable[[Weights], Weights], table: Any) -> dict[str, Any]:
    """What their network makes of a file of ours: how many layers, which keys it has no module for, and how far any weight is from what it
    should be, over the layer's largest change."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    before = convert({key: value.clone() for key, value in model.state_dict().items()})
    pairs = pairs_for(table, before)
    tensors = exporting.FORM["kohya"](kind, "transformer", pairs)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "ours.safetensors"))
        save_file({key: value.contiguous() for key, value in tensors.items()}, path)
        made, weights = network.create_network_from_weights(1.0, path, None, [], model, for_inference=True)
    names = {module.lora_name for module in made.unet_loras}
    left = sorted({key.partition(".")[0] for key in tensors} - names)
    made.merge_to([], model, weights)
    after = convert({key: value.clone() for key, value in model.state_dict().items()})
    apart = 0.0
    for key, value in before.items():
        layer = key.removesuffix(".weight")
        wanted = torch.zeros_like(value)
        if key.endswith(".weight") and layer in pairs:
            wanted = pairs[layer].scale * pairs[layer].up @ pairs[layer].down
        apart = max(apart, float((after[key] - value - wanted).abs().max() / wanted.abs().max().clamp_min(1.0)))
    return {"layers": len(pairs), "modules": len(names), "left over": left, "apart": float(f"{apart:.1g}")}


def flux() -> dict[str, Any]:
    """FLUX.1."""
    from library import flux_models  # type: ignore[import-not-found]
    from networks import lora_flux  # type: ignore[import-not-found]

    heads = 2
    axes = [16, 24, 24]
    sizes = (16, 24, 40, WIDTH, 4.0, heads, BLOCKS, BLOCKS, axes, 10_000, True, False)
    # The converter knows one width, as a number in its code.
    whole = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers
    numbers = tuple(WIDTH if number == 3072 else number for number in whole.__code__.co_consts)
    small = types.FunctionType(whole.__code__.replace(co_consts=numbers), whole.__globals__)
    model = flux_models.Flux(flux_models.FluxParams(*sizes))
    return read("FluxTransformer2DModel", lora_flux, model, small, FLUX)


def sd3() -> dict[str, Any]:
    """Stable Diffusion 3.5 Medium, whose first block attends to itself once more."""
    from library import sd3_models  # type: ignore[import-not-found]
    from networks import lora_sd3  # type: ignore[import-not-found]

    model = sd3_models.create_sd3_mmdit(
        sd3_models.SD3Params(2, BLOCKS, 64, 8, 24, "rms", [0], 40, WIDTH, "sd3-5-medium")
    )
    convert = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers
    return read("SD3Transformer2DModel", lora_sd3, model, convert, SD3)


def _attended(model: Any) -> Collection[str]:
    """The linear layers of a U-Net's transformers, by diffusers' names."""
    return [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and ".attentions." in name
    ]


def unet(xl: bool) -> dict[str, Any]:
    """Stable Diffusion 1, or XL: names alone."""
    from networks import lora  # type: ignore[import-not-found]

    from diffalign import config
    from diffalign.planning import architectures

    with torch.device("meta"):
        if xl:
            from library.sdxl_original_unet import SdxlUNet2DConditionModel as Model  # type: ignore[import-not-found]

            theirs = Model()
        else:
            from library.original_unet import UNet2DConditionModel as Model  # type: ignore[import-not-found]

            theirs = Model(8, 64, 768, False, False)
    names = {module.lora_name for module in lora.LoRANetwork([], theirs, is_sdxl=xl).unet_loras}
    ours = architectures.denoisers(config.load("ddpo/sdxl" if xl else "ddpo/sd15"))[0]["unet"]
    layers = sorted({name.replace(".base_layer", "") for name in _attended(ours) if ".lora_" not in name})
    pairs = {layer: Pair(torch.zeros(1, 1), torch.zeros(1, 1), 1.0) for layer in layers}
    tensors = exporting.FORM["kohya"]("UNet2DConditionModel", "unet", pairs)
    if xl:
        lora.convert_diffusers_to_sai_if_needed(tensors)  # as it does when it reads a file
    left = sorted({key.partition(".")[0] for key in tensors} - names)
    found = {"layers": len(layers), "modules": len(names), "left over": left}
    if xl:  # and the other way: every name of theirs is one that we read
        whole = [name.replace(".base_layer", "") for name, part in ours.named_modules() if hasattr(part, "weight")]
        known = {f"lora_unet_{name.replace('.', '_')}" for name in unet_blocks(whole)}
        found["not read by us"] = sorted(names - known)
    return found


READINGS: dict[str, Callable[[], dict[str, Any]]] = {
    "FLUX.1": flux,
    "SD 3.5 Medium": sd3,
    "SD 1.5, names": lambda: unet(False),
    "SDXL, names": lambda: unet(True),
}


# -- Forge's copy of ComfyUI's reader


def patched(table: dict[str, Any], stub: Any, module: Any, form: str, names: Any) -> dict[str, Any]:
    """What the reader makes of a file of ours: keys that it leaves over, and how far what it adds to any layer is from the file's pair, by
    its own table of where a layer of diffusers' is among its weights."""
    from packages_3rdparty.comfyui_lora_collection import lora  # type: ignore[import-not-found]

    kind = type(module).__name__
    pairs = pairs_for(names, module.state_dict())
    tensors = exporting.FORM[form](kind, "transformer", pairs)
    patches, left = lora.load_lora(tensors, lora.model_lora_keys_unet(stub, {})[1])
    sums: dict[tuple[str, tuple[int, int] | None], torch.Tensor] = {}
    for target, (_, (up, down, alpha, _, _)) in patches.items():
        key, rows = (target, None) if isinstance(target, str) else (target[0], target[1][1:])
        sums[key, rows] = up @ down * (1.0 if alpha is None else alpha / len(down))
    apart = 0.0
    for layer, pair in pairs.items():
        target = table[f"{layer}.weight"]
        key, rows = (target, None) if isinstance(target, str) else (target[0], target[1][1:])
        if (whole := sums.get((key, None))) is not None:
            found = whole if rows is None else whole[rows[0] : rows[0] + rows[1]]
        else:
            found = sums[key, rows]
        wanted = pair.scale * pair.up @ pair.down
        apart = max(apart, float((found - wanted).abs().max() / wanted.abs().max()))
    return {"layers": len(pairs), "left over": sorted(left), "apart": float(f"{apart:.1g}")}


def _stub(table: dict[str, Any], config: dict[str, Any], repository: str) -> Any:
    keys = {target if isinstance(target, str) else target[0]: None for target in table.values()}
    model = types.SimpleNamespace(state_dict=lambda: keys, diffusion_model=types.SimpleNamespace(config=config))
    model.config = types.SimpleNamespace(huggingface_repo=repository)
    return model


def forge_flux(form: str) -> dict[str, Any]:
    """FLUX.1."""
    from diffusers import FluxTransformer2DModel
    from packages_3rdparty.comfyui_lora_collection import utils  # type: ignore[import-not-found]

    module = FluxTransformer2DModel(
        in_channels=16,
        num_layers=BLOCKS,
        num_single_layers=BLOCKS,
        attention_head_dim=WIDTH // 2,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=24,
        axes_dims_rope=(16, 24, 24),
    )
    config = {"depth": BLOCKS, "depth_single_blocks": BLOCKS, "hidden_size": WIDTH}
    table = utils.flux_to_diffusers(config, output_prefix="diffusion_model.")
    return patched(table, _stub(table, config, "black-forest-labs/FLUX.1-dev"), module, form, FLUX)


def forge_sd3(form: str) -> dict[str, Any]:
    """Stable Diffusion 3 Medium."""
    from diffusers import SD3Transformer2DModel
    from packages_3rdparty.comfyui_lora_collection import utils  # type: ignore[import-not-found]

    module = SD3Transformer2DModel(
        sample_size=8,
        num_layers=BLOCKS,
        attention_head_dim=64,
        num_attention_heads=BLOCKS,
        joint_attention_dim=24,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=24,
    )
    table = utils.mmdit_to_diffusers({"depth": BLOCKS}, output_prefix="diffusion_model.")
    return patched(table, _stub(table, {"depth": BLOCKS}, "stable-diffusion-3"), module, form, SD3)


def forge_sdxl() -> dict[str, Any]:
    """The numbers of SDXL's blocks, as we read them."""
    from packages_3rdparty.comfyui_lora_collection import utils  # type: ignore[import-not-found]

    depths = {"transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10]}
    config = {"num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "transformer_depth_middle": 10, **depths}
    theirs = {
        ours.removesuffix(".weight"): name.removesuffix(".weight")
        for ours, name in utils.unet_to_diffusers(config).items()
        # Their table is for all U-Nets: SDXL has no classes, and does not halve a third time.
        if ours.endswith(".weight")
        and "norm" not in ours
        and not ours.startswith(("class_", "down_blocks.2.downsamplers"))
    }
    read = {ours: name for name, ours in unet_blocks(list(theirs)).items()}
    wrong = sorted(layer for layer, name in theirs.items() if read.get(layer) != name)
    return {"layers": len(theirs), "left over": wrong}


FORGE: dict[str, Callable[[], dict[str, Any]]] = {
    "FLUX.1, comfyui": lambda: forge_flux("comfyui"),
    "FLUX.1, kohya": lambda: forge_flux("kohya"),
    "SD 3, kohya": lambda: forge_sd3("kohya"),
    "SDXL, block numbers": forge_sdxl,
}
COPY = "packages_3rdparty/comfyui_lora_collection/"
REPOSITORIES = {
    "kohya-ss/sd-scripts": (READINGS, FILES),
    "lllyasviel/stable-diffusion-webui-forge": (FORGE, (f"{COPY}lora.py", f"{COPY}utils.py")),
}


def main(repository: str, directory: Path, commit: str = "") -> dict[str, Any]:
    """What a repository's code makes of our files, and what of it was read."""
    readings, files = REPOSITORIES[repository]
    sys.path.insert(0, str(directory.absolute()))
    try:
        found = {name: reading() for name, reading in readings.items()}
    finally:
        sys.path.remove(str(directory.absolute()))
    command = ["git", "-C", str(directory), "rev-parse", "HEAD"]
    commit = commit or subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    hashes = {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in files}
    return {"commit": commit, "files": hashes, "found": found}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tools.lora_readers", description=__doc__)
    parser.add_argument("repository", choices=REPOSITORIES)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--commit", default="", help="of a copy without git")
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    result = main(asked.repository, asked.directory, asked.commit)
    print(json.dumps(result, indent=1))
    if asked.write:
        kept = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
        KEPT.write_text(json.dumps({**kept, asked.repository: result}, indent=1) + "\n")
