"""Pipelines of the families people align, of their real classes, with tiny random weights: nothing is downloaded."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from diffalign.models import loading
from diffalign.models import lora as adapters
from tests.families import images, videos


@dataclass(frozen=True)
class Family:
    """make: a pipeline; process: how it is walked; call: arguments that keep it tiny; guide: the argument that guides."""

    make: Callable[[], Any]
    process: str = "flow_sde"
    call: dict[str, Any] = field(default_factory=dict)
    guide: str = "guidance_scale"


FAMILIES = {
    "SD 1.5": Family(images.sd15, "ddim"),
    "SD 2.1": Family(images.sd21, "ddim"),
    "SDXL": Family(images.sdxl, "ddim", {"height": 64, "width": 64}),
    "SD 3.5 Medium": Family(images.sd35_medium, call={"height": 32, "width": 32, "max_sequence_length": 8}),
    "SD 3.5 Large": Family(images.sd35_large, call={"height": 32, "width": 32, "max_sequence_length": 8}),
    "FLUX.1-dev": Family(images.flux_dev, call={"height": 16, "width": 16, "max_sequence_length": 16}),
    "FLUX.1-schnell": Family(images.flux_schnell, call={"height": 16, "width": 16, "max_sequence_length": 16}),
    "FLUX.2-dev": Family(
        images.flux2_dev,
        call={"height": 32, "width": 32, "max_sequence_length": 512, "text_encoder_out_layers": (1,)},
    ),
    "FLUX.2-klein": Family(
        images.flux2_klein,
        call={"height": 32, "width": 32, "max_sequence_length": 16, "text_encoder_out_layers": (1,)},
    ),
    "Qwen-Image": Family(
        images.qwen_image, call={"height": 32, "width": 32, "negative_prompt": " "}, guide="true_cfg_scale"
    ),
    "Z-Image": Family(images.z_image, call={"height": 32, "width": 32, "max_sequence_length": 32}),
    "Sana": Family(
        images.sana,
        call={
            "height": 32,
            "width": 32,
            "max_sequence_length": 16,
            "complex_human_instruction": None,
            "use_resolution_binning": False,
        },
    ),
    "CogView4": Family(images.cogview4, call={"height": 16, "width": 16, "max_sequence_length": 16}),
    "Wan 2.1": Family(videos.wan21, call={"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 16}),
    "Wan 2.2": Family(videos.wan22, call={"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 16}),
    "HunyuanVideo": Family(
        videos.hunyuan_video,
        call={
            "height": 16,
            "width": 16,
            "num_frames": 5,
            "max_sequence_length": 16,
            "prompt_template": {"template": "{}", "crop_start": 0},
        },
    ),
    "LTX-Video": Family(videos.ltx, call={"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16}),
}


@functools.cache
def _home() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="families")


def folder(name: str) -> Path:
    """A family's pipeline saved as the hub lays it out, with the same random weights every time."""
    place = Path(_home().name) / name.replace(" ", "-")
    if not place.exists():
        with torch.random.fork_rng(devices=[]), adapters.quiet():
            torch.manual_seed(0)
            FAMILIES[name].make().save_pretrained(place)
    return place


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A family's pipeline, loaded as a run loads it."""
    return loading.load(str(folder(name)), dtype)[0]
