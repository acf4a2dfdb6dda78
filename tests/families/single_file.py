"""A Stable Diffusion pipeline's weights under the names of its authors' files, written from those names alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

Weights = dict[str, Tensor]
RESNET = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}
ENDS = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
}
ATTENTION = {"group_norm.": "norm.", "to_q.": "q.", "to_k.": "k.", "to_v.": "v.", "to_out.0.": "proj_out."}


def _resnet(name: str) -> str:
    for ours, theirs in RESNET.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise AssertionError(name)


def _unet_name(name: str, layers: int) -> str:
    """Their blocks are numbered through: going down each of ours is `layers` of theirs and a downsampler, going up `layers` + 1."""
    for ours, theirs in ENDS.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    part, *rest = name.split(".")
    if part == "mid_block":
        kind, index, tail = rest[0], int(rest[1]), ".".join(rest[2:])
        return f"middle_block.{2 * index}.{_resnet(tail)}" if kind == "resnets" else f"middle_block.1.{tail}"
    block, kind, index, tail = int(rest[0]), rest[1], int(rest[2]), ".".join(rest[3:])
    if part == "down_blocks":
        number = 1 + block * (layers + 1) + index
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{tail.removeprefix('conv.')}"
        return f"input_blocks.{number}." + (f"0.{_resnet(tail)}" if kind == "resnets" else f"1.{tail}")
    number = block * (layers + 1) + index
    if kind == "upsamplers":
        return f"output_blocks.{block * (layers + 1) + layers}.{{up}}.{tail}"
    return f"output_blocks.{number}." + (f"0.{_resnet(tail)}" if kind == "resnets" else f"1.{tail}")


def unet(net: Any) -> Weights:
    weights = net.state_dict()
    found = {}
    for name, value in weights.items():
        theirs = _unet_name(name, net.config.layers_per_block)
        if "{up}" in theirs:  # after the attention where the block has some
            theirs = theirs.format(up=2 if f"up_blocks.{name.split('.')[1]}.attentions.0.norm.weight" in weights else 1)
        found[f"model.diffusion_model.{theirs}"] = value
    return found


def _vae_name(name: str, blocks: int) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    for index in range(blocks):
        name = name.replace(f"down_blocks.{index}.resnets", f"down.{index}.block")
        name = name.replace(f"down_blocks.{index}.downsamplers.0", f"down.{index}.downsample")
        name = name.replace(f"up_blocks.{index}.resnets", f"up.{blocks - 1 - index}.block")
        name = name.replace(f"up_blocks.{index}.upsamplers.0", f"up.{blocks - 1 - index}.upsample")
    name = name.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
    if "mid_block.attentions.0." in name:
        name = name.replace("mid_block.attentions.0.", "mid.attn_1.")
        for ours, theirs in ATTENTION.items():
            name = name.replace(ours, theirs)
    return f"first_stage_model.{name}"


def vae(net: Any) -> Weights:
    found = {}
    for name, value in net.state_dict().items():
        theirs = _vae_name(name, len(net.config.block_out_channels))
        pointwise = ".attn_1." in theirs and theirs.endswith("weight") and value.ndim == 2
        found[theirs] = value[:, :, None, None] if pointwise else value  # their projections are convolutions
    return found


def clip(net: Any) -> Weights:
    return {
        f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}": value
        for name, value in net.state_dict().items()
    }
