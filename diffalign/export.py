"""`diffalign export`: an adapter under the names ComfyUI reads, with its strength in the file.

ComfyUI (comfy/lora.py at 17358c8) reads layers of Stable Diffusion 1, 2 and XL as `lora_unet_<layer>`, dots as underscores, and
those of Stable Diffusion 3, FLUX.1, Qwen-Image and Z-Image as `transformer.<layer>`, both as diffusers names them. It knows
nothing of diffusers' metadata: without `<layer>.alpha` an adapter acts with strength 1 instead of alpha / rank.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from diffalign.files import LORA, lora_folder, make_folder
from diffalign.types import UserError, one_line

# Denoisers whose layers ComfyUI finds under diffusers' own names.
READABLE = (
    "UNet2DConditionModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
    "QwenImageTransformer2DModel",
    "ZImageTransformer2DModel",
)


def comfyui(folder: Path, out: Path) -> int:
    """Write an adapter folder's LoRA for ComfyUI; returns how many layers it has.

    Raises:
        UserError: if there is no adapter of ours, or ComfyUI cannot read its model's layers.
    """
    if out.suffix != ".safetensors":
        raise UserError(f"--out: got {str(out)!r}, allowed is a .safetensors file")
    place = lora_folder(folder)
    if place is None:
        raise UserError(f"export: got {str(folder)!r}, no {LORA} there; allowed is a run or an adapter folder")
    path = place / LORA
    if out.exists() and out.samefile(path):
        raise UserError(f"--out: got {str(out)!r}, which is the adapter itself; name another file")
    try:
        with safe_open(path, framework="np") as file:
            notes = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
    except (OSError, SafetensorError) as error:
        raise UserError(f"export: {path} is damaged: {one_line(error)}") from error
    denoisers = json.loads(notes.get("denoisers", "[]"))
    if not denoisers or (unread := [name for name in denoisers if name not in READABLE]):
        what = ", ".join(unread) if denoisers else "an adapter that does not say its denoiser"
        raise UserError(f"export: got {what}; ComfyUI reads the layers of {', '.join(READABLE)} under their names here")
    if "lora_adapter_metadata" not in notes:
        raise UserError(f"export: {path} does not say its alpha")
    written = _named(tensors, json.loads(notes["lora_adapter_metadata"]))
    make_folder(out.parent, "--out")
    try:
        save_file(written, out, metadata={k: v for k, v in notes.items() if k != "lora_adapter_metadata"})
    except (OSError, SafetensorError) as error:
        raise UserError(f"--out: got {str(out)!r}, cannot write there ({one_line(error)})") from error
    return sum(key.endswith(".alpha") for key in written)


def _named(tensors: dict[str, np.ndarray], settings: dict[str, float]) -> dict[str, np.ndarray]:
    """The tensors of diffusers' layout under ComfyUI's names, with an alpha each."""
    written: dict[str, np.ndarray] = {}
    for key, tensor in tensors.items():
        layer, _, half = key.removesuffix(".weight").rpartition(".")
        component, _, name = layer.partition(".")
        if component == "unet":
            layer, half = f"lora_unet_{name.replace('.', '_')}", {"lora_A": "lora_down", "lora_B": "lora_up"}[half]
        written[f"{layer}.{half}.weight"] = tensor
        written[f"{layer}.alpha"] = np.array(settings[f"{component}.lora_alpha"], np.float32)
    return written
