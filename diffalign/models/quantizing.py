"""A frozen denoiser whose linear layers are held in 8 or 4 bits, through diffusers' own quantisation.

The quantised network is the base: it samples, replays and is the reference. Quantising the same file again gives the same numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffalign.errors import UserError
from diffalign.models import lora as adapters
from diffalign.runtime.extras import missing
from diffalign.runtime.precision import QUANTIZERS


def check(quantize: str, device: str, field: str = "memory.quantize") -> None:
    """Whether that can be done here; `none` always.

    Raises:
        UserError: with what is missing.
    """
    if quantize == "none":
        return
    if mend := missing(QUANTIZERS[quantize]):
        raise UserError(f"{field}: got {quantize}, which needs {QUANTIZERS[quantize]}; {mend}")
    if quantize == "nf4" and not device.startswith("cuda"):
        raise UserError(f"{field}: got nf4, which needs a CUDA device, this is {device}; allowed here is none, int8")


def settings(quantize: str, dtype: torch.dtype) -> Any:
    """What diffusers' loaders are told, for products in `dtype`; None: as the weights are."""
    import diffusers

    if quantize == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return diffusers.TorchAoConfig(Int8WeightOnlyConfig())
    if quantize == "nf4":
        return diffusers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return None


def mapped(bits: Any, folder: Path) -> Any:
    """What a pipeline's loader is told for a folder's denoisers."""
    if bits is None:
        return None
    from diffusers import PipelineQuantizationConfig

    return PipelineQuantizationConfig(
        quant_mapping={name: bits for name in adapters.DENOISERS if (folder / name).is_dir()}
    )
