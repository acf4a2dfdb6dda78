"""What a LoRA file says of itself to model managers and tools: modelspec 1.0.1 and kohya's ss_ keys, as strings, and nothing of this
machine."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

import diffalign
from diffalign.models.hub_files import HubPlace
from diffalign.models.notes import Notes
from diffalign.models.places import parted

# Denoiser -> what it is called in modelspec.architecture, and in kohya's ss_base_model_version; which of several, `_kind` says.
_NAMES = {
    "sd1": ("stable-diffusion-v1", "sd_1.5"),
    "sd2": ("stable-diffusion-v2-768-v", "sd_2.1"),
    "sdxl": ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
    "SD3Transformer2DModel": ("stable-diffusion-3-medium", "sd3"),
    "FluxTransformer2DModel": ("flux-1-dev", "flux1"),
    "Flux2Transformer2DModel": ("Flux.2-dev", "flux2"),
    "QwenImageTransformer2DModel": ("Qwen-Image", "qwen_image"),
    "ZImageTransformer2DModel": ("Z-Image", "zimage"),
    "WanTransformer3DModel": ("wan2.1", "wan2.1"),
    "HunyuanVideoTransformer3DModel": ("hunyuan-video", "hunyuan_video"),
    "LTXVideoTransformer3DModel": ("ltx-video", "ltxv"),
    "SanaTransformer2DModel": ("sana", "sana"),
    "CogView4Transformer2DModel": ("cogview4", "cogview4"),
}
_CONTEXT = {1024: "sd2", 2048: "sdxl"}  # a U-Net's width of text; Stable Diffusion 1 has 768
# By a part of the base model's name, where one class serves several.
_VARIANTS = (
    ("FluxTransformer2DModel", "schnell", "flux-1-schnell"),
    ("Flux2Transformer2DModel", "klein", "Flux.2-klein-4b"),
    ("SD3Transformer2DModel", "3.5-medium", "stable-diffusion-3-5-medium"),
    ("SD3Transformer2DModel", "3.5-large", "stable-diffusion-3-5-large"),
    ("WanTransformer3DModel", "2.2", "wan2.2"),
)
_IMPLEMENTATION = {
    "sdxl": "https://github.com/Stability-AI/generative-models",
    "FluxTransformer2DModel": "https://github.com/black-forest-labs/flux",
}


def public(name: str) -> str:
    """A name that says nothing of this machine: of a path its last part."""
    if "://" in name or (HubPlace.of(parted(name)[0]) and not Path(name).exists()):
        return name
    before, at, place = name.rpartition("@")
    before = Path(before).name  # RUN@130
    path, colon, attribute = place.rpartition(":") if ".py:" in place else (place, "", "")
    return f"{before}{at}{Path(path).name or path}{colon}{attribute}"


def of(
    notes: Notes, denoiser: str, pairs: Mapping[str, Any], tensors: Mapping[str, Tensor], title: str
) -> dict[str, str]:
    """The metadata of an exported file; every strength is in its tensors."""
    kind = _kind(denoiser, pairs)
    architecture, version = _NAMES.get(kind, (denoiser, denoiser))
    for name, part, variant in _VARIANTS:
        architecture = variant if name == denoiser and part in notes.base_model.lower() else architecture
    ranks = {pair.rank for pair in pairs.values()}
    rank = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    size = (notes.call.get("width", 1024), notes.call.get("height", 1024))
    rewards = json.dumps({public(name): weight for name, weight in notes.rewards.items()})
    rule = notes.rule.get("name", "")
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": _IMPLEMENTATION.get(kind, "diffusers"),
        "modelspec.title": title,
        "modelspec.resolution": f"{size[0]}x{size[1]}",
        "modelspec.description": f"LoRA trained with {rule or 'diffalign'} to raise {rewards}",
        "modelspec.date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "modelspec.hash_sha256": _hash(tensors),
        "ss_v2": str(kind == "sd2"),
        "ss_base_model_version": version,
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_network_args": "{}",
        "ss_output_name": title,
        "ss_sd_model_name": public(notes.base_model),
        "base_model": public(notes.base_model),
        "rule": json.dumps(notes.rule, sort_keys=True),
        "rewards": rewards,
        "updates": str(notes.updates),
        "seed": str(notes.seed),
        "call": json.dumps(notes.call, sort_keys=True),
        **({"start": public(notes.start)} if notes.start else {}),
        **({"guidance_steps": json.dumps(notes.guidance_steps)} if notes.guidance_steps else {}),
        "frozen": json.dumps([f"{public(spec['place'])}:{spec['strength']:g}" for spec in notes.frozen]),
        "diffalign_version": diffalign.__version__,
    }


def _kind(denoiser: str, pairs: Mapping[str, Any]) -> str:
    """A U-Net's generation by the width of the text that it attends to; of others their class."""
    if denoiser != "UNet2DConditionModel":
        return denoiser
    widths = (pair.down.shape[1] for layer, pair in pairs.items() if re.search(r"attn2\.to_[kv]$", layer))
    return _CONTEXT.get(next(widths, 768), "sd1")


def _hash(tensors: Mapping[str, Tensor]) -> str:
    import torch

    found = hashlib.sha256()
    for key in sorted(tensors):
        found.update(tensors[key].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"0x{found.hexdigest()}"
