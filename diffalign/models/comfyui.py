"""`diffalign export`: an adapter under the names ComfyUI reads, with its strength in the file.

ComfyUI (comfy/lora.py at 17358c8) reads layers of Stable Diffusion 1, 2 and XL as `lora_unet_<layer>`, dots as underscores, those
of Stable Diffusion 3, FLUX.1, Qwen-Image and Z-Image as `transformer.<layer>`, both as diffusers names them, and any layer as
`diffusion_model.<layer>` as its authors name it. It knows nothing of diffusers' metadata: without `<layer>.alpha` an adapter acts with
strength 1 instead of alpha / rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from diffalign.errors import UserError, one_line, shown
from diffalign.models import halves
from diffalign.models.notes import LORA, Notes, files_of, lora_folder, lora_settings
from diffalign.runtime.files import make_folder, share


@dataclass(frozen=True)
class Names:
    """How ComfyUI names a denoiser's layers: a prefix, underscores for dots, and what its authors call parts of a name."""

    prefix: str
    flat: bool = False
    renames: tuple[tuple[str, str], ...] = ()

    def __call__(self, layer: str) -> str:
        for ours, theirs in self.renames:
            layer = layer.replace(ours, theirs)
        return self.prefix + (layer.replace(".", "_") if self.flat else layer)


# diffusers 0.42.1's single_file_utils.convert_wan_transformer_to_diffusers, the other way round
WAN = (
    *((f".to_{kind}", f".{kind}") for kind in ("q", "k", "v")),
    *((".to_out.0", ".o"), ("attn1.", "self_attn."), ("attn2.", "cross_attn.")),
    *(("ffn.net.0.proj", "ffn.0"), ("ffn.net.2", "ffn.2"), (".add_k_proj", ".k_img"), (".add_v_proj", ".v_img")),
)
READABLE = {
    "UNet2DConditionModel": Names("lora_unet_", flat=True),
    "SD3Transformer2DModel": Names("transformer."),
    "FluxTransformer2DModel": Names("transformer."),
    "QwenImageTransformer2DModel": Names("transformer."),
    "ZImageTransformer2DModel": Names("transformer."),
    "LTXVideoTransformer3DModel": Names("diffusion_model."),
    "WanTransformer3DModel": Names("diffusion_model.", renames=WAN),
}


def comfyui(folder: Path, out: Path) -> dict[Path, int]:
    """Write an adapter folder's LoRA for ComfyUI; returns the files and how many layers each has, one for every expert.

    Raises:
        UserError: if there is no adapter of ours, or ComfyUI cannot read its model's layers.
    """
    if out.suffix != ".safetensors":
        raise UserError(f"--out: got {str(out)!r}, allowed is a .safetensors file")
    place = lora_folder(folder)
    if place is None:
        raise UserError(f"export: got {str(folder)!r}, no {LORA} there; allowed is a run or an adapter folder")
    stem = LORA.removesuffix(".safetensors")
    sources = {path.name.removeprefix(stem): path for path in files_of(place)}
    targets = {ending: out.with_name(out.name.removesuffix(".safetensors") + ending) for ending in sources}
    if any(target.exists() and target.samefile(path) for target in targets.values() for path in sources.values()):
        raise UserError(f"--out: got {str(out)!r}, which is the adapter itself; name another file")
    made = {targets[ending]: _converted(path) for ending, path in sources.items()}
    make_folder(out.parent, "--out")
    for target, (tensors, notes) in made.items():
        try:
            save_file(tensors, target, metadata=notes)
            share(target)
        except (OSError, SafetensorError) as error:
            raise UserError(f"--out: got {str(target)!r}, cannot write there ({one_line(error)})") from error
    return {target: sum(key.endswith(".alpha") for key in tensors) for target, (tensors, _) in made.items()}


def _converted(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """A LoRA file's tensors under ComfyUI's names, with an alpha each, and its notes."""
    try:
        with safe_open(path, framework="np") as file:
            notes = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
        halves.layers(tensors, lambda tensor: bool(np.isfinite(tensor).all()))
    except ValueError as error:
        raise UserError(f"export: {path}: {error}") from error
    except (OSError, SafetensorError, TypeError, AttributeError) as error:  # the last two: a dtype that numpy has not
        raise UserError(f"export: {path} is damaged: {one_line(error)}") from error
    try:
        denoisers = Notes.of(notes).denoisers
    except ValueError as error:
        raise UserError(f"export: {path}: {error}") from error
    if not denoisers or (unread := [name for name in denoisers if name not in READABLE]):
        what = ", ".join(unread) if denoisers else "an adapter that does not say its denoiser"
        raise UserError(f"export: got {what}; ComfyUI's names are known here for {', '.join(READABLE)}")
    if "lora_adapter_metadata" not in notes:
        raise UserError(f"export: {path} does not say its alpha")
    try:
        settings = lora_settings(notes)
    except ValueError as error:
        raise UserError(f"export: {path}: {error}") from error
    del notes["lora_adapter_metadata"]
    names, written = READABLE[denoisers[0]], {}
    for key, tensor in tensors.items():
        layer, _, half = key.removesuffix(".weight").rpartition(".")
        component, _, name = layer.partition(".")
        half = {"lora_A": "lora_down", "lora_B": "lora_up"}[half] if names.flat else half
        written[f"{names(name)}.{half}.weight"] = tensor
        alpha = settings.get(f"{component}.lora_alpha")
        if type(alpha) not in (int, float) or half not in ("lora_down", "lora_up", "lora_A", "lora_B"):
            raise UserError(f"export: {path}: {shown(key)} has no alpha, or is no half of a LoRA")
        written[f"{names(name)}.alpha"] = np.array(alpha, np.float32)
    return written, notes
