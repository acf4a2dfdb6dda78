"""The keys of a config that say how its run uses the machine. Data only."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from diffalign.config.kinds import ASKED, FREE, Precision
from diffalign.runtime.precision import QUANTIZE
from diffalign.runtime.settings import Settings

Attention = Literal[
    "auto",
    "native",
    "xformers",
    "flash",
    "_flash_3_hub",
    "_native_cudnn",
    "_native_efficient",
    "_native_flash",
    "_native_math",
]
Checkpoint = Literal["none", "blocks", "spans", "both"]
Speed = Literal["auto", "eager", "graphs", "compile"]
Quantize = Literal["none", "int8", "nf4"]
assert Quantize.__args__ == QUANTIZE  # type: ignore[attr-defined]


class MemorySection(Settings):
    """What is held where, and in how many bits. Where a key changes no number, it may change with every start."""

    model_config = ConfigDict(json_schema_extra=FREE)

    checkpoint: Literal["auto", "none", "blocks", "spans", "both"] = Field(
        "none",
        description="run again for the gradient, not kept; auto: blocks, over steps both; embedded, unnamed: none",
    )
    quantize: Quantize = Field(
        "none",
        description="what the denoiser's linear layers are held in: 8 bits (torchao), 4 (bitsandbytes, CUDA alone)",
        json_schema_extra=ASKED,
    )
    shard: Literal["none", "blocks"] = Field(
        "none",
        description="of several processes: each has the whole denoiser, or a part of each block, gathered when it runs (FSDP2)",
    )
    decode: Literal["whole", "sliced", "tiled"] = Field(
        "whole",
        description="finished latents: a batch at once, sample by sample, or in overlapping tiles, which blends seams",
        json_schema_extra=ASKED,
    )
    judges: Literal["resident", "offloaded"] = Field(
        "resident", description="networks of learned rewards between uses: on the device, or in host memory"
    )
    judge_precision: Precision = Field(
        "float32",
        description="of learned rewards in training; evaluations are judged in float32, by copies",
        json_schema_extra=ASKED,
    )
    encode_on: Literal["device", "cpu"] = Field(
        "device",
        description="where prompts are encoded for prompts.cache; cpu: for text encoders that are larger than the card",
    )
    vram: float | None = Field(None, gt=0, le=1e4, description="GiB that the settings were chosen for by --vram")
    counted: float | None = Field(None, gt=0, description="GiB that the run takes, as --vram counted")
