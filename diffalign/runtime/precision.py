"""What weights are held in, and the bytes that one takes. The only table of it; needs no torch."""

from __future__ import annotations

PRECISIONS = {"float32": 4.0, "bfloat16": 2.0}  # torch's names
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}
# Of the weights of a quantised network's linear layers; all others keep their precision. int8: one scale a row besides. nf4: blocks of 64
# with an 8-bit scale each, and one of 32 bits for 256 blocks: 4 + 8 / 64 + 32 / (64 * 256) bits.
QUANTIZED = {"int8": 1.0, "nf4": (4 + 8 / 64 + 32 / (64 * 256)) / 8}
QUANTIZE = ("none", *QUANTIZED)
QUANTIZERS = {"int8": "torchao", "nf4": "bitsandbytes"}  # whose layers they are
