"""What others call the layers of diffusers' denoisers. Data, and how to look names up in it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

FORMATS = ("comfyui", "kohya", "diffusers", "peft")  # that adapters are exported in


@dataclass(frozen=True)
class Names:
    """How a tool names a denoiser's layers: a prefix, underscores for dots, what it calls parts of a name, and which layers of ours are one
    there."""

    prefix: str
    flat: bool = False
    renames: tuple[tuple[str, str], ...] = ()
    joined: dict[str, tuple[str, ...]] | None = None

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
_QKV = ("to_q", "to_k", "to_v")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")


def _of(block: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{block}.{name}" for name in names)


# The authors' names of blocks' layers -> diffusers' names of what is in them, # a block's number [ComfyUI 0.19.3, diffusers 0.42.1].
FLUX = {
    "double_blocks.#.img_attn.qkv": _of("transformer_blocks.#.attn", _QKV),
    "double_blocks.#.txt_attn.qkv": _of("transformer_blocks.#.attn", _ADDED),
    "double_blocks.#.img_attn.proj": ("transformer_blocks.#.attn.to_out.0",),
    "double_blocks.#.txt_attn.proj": ("transformer_blocks.#.attn.to_add_out",),
    "double_blocks.#.img_mlp.0": ("transformer_blocks.#.ff.net.0.proj",),
    "double_blocks.#.img_mlp.2": ("transformer_blocks.#.ff.net.2",),
    "double_blocks.#.txt_mlp.0": ("transformer_blocks.#.ff_context.net.0.proj",),
    "double_blocks.#.txt_mlp.2": ("transformer_blocks.#.ff_context.net.2",),
    "double_blocks.#.img_mod.lin": ("transformer_blocks.#.norm1.linear",),
    "double_blocks.#.txt_mod.lin": ("transformer_blocks.#.norm1_context.linear",),
    "single_blocks.#.linear1": (*_of("single_transformer_blocks.#.attn", _QKV), "single_transformer_blocks.#.proj_mlp"),
    "single_blocks.#.linear2": ("single_transformer_blocks.#.proj_out",),
    "single_blocks.#.modulation.lin": ("single_transformer_blocks.#.norm.linear",),
}
SD3 = {
    "joint_blocks.#.x_block.attn.qkv": _of("transformer_blocks.#.attn", _QKV),
    "joint_blocks.#.x_block.attn2.qkv": _of("transformer_blocks.#.attn2", _QKV),
    "joint_blocks.#.context_block.attn.qkv": _of("transformer_blocks.#.attn", _ADDED),
    "joint_blocks.#.x_block.attn.proj": ("transformer_blocks.#.attn.to_out.0",),
    "joint_blocks.#.x_block.attn2.proj": ("transformer_blocks.#.attn2.to_out.0",),
    "joint_blocks.#.context_block.attn.proj": ("transformer_blocks.#.attn.to_add_out",),
    "joint_blocks.#.x_block.mlp.fc1": ("transformer_blocks.#.ff.net.0.proj",),
    "joint_blocks.#.x_block.mlp.fc2": ("transformer_blocks.#.ff.net.2",),
    "joint_blocks.#.context_block.mlp.fc1": ("transformer_blocks.#.ff_context.net.0.proj",),
    "joint_blocks.#.context_block.mlp.fc2": ("transformer_blocks.#.ff_context.net.2",),
}
HUNYUAN = FLUX | {
    "txt_in.individual_token_refiner.blocks.#.self_attn.qkv": _of(
        "context_embedder.token_refiner.refiner_blocks.#.attn", _QKV
    ),
    **{
        f"txt_in.individual_token_refiner.blocks.#.{theirs}": (
            f"context_embedder.token_refiner.refiner_blocks.#.{ours}",
        )
        for theirs, ours in (("self_attn.proj", "attn.to_out.0"), ("mlp.0", "ff.net.0.proj"), ("mlp.2", "ff.net.2"))
    },
}
FLUX2 = {
    **{key: FLUX[key] for key in list(FLUX)[:4]},
    "double_blocks.#.img_mlp.0": ("transformer_blocks.#.ff.linear_in",),
    "double_blocks.#.img_mlp.2": ("transformer_blocks.#.ff.linear_out",),
    "double_blocks.#.txt_mlp.0": ("transformer_blocks.#.ff_context.linear_in",),
    "double_blocks.#.txt_mlp.2": ("transformer_blocks.#.ff_context.linear_out",),
    "single_blocks.#.linear1": ("single_transformer_blocks.#.attn.to_qkv_mlp_proj",),
    "single_blocks.#.linear2": ("single_transformer_blocks.#.attn.to_out",),
}
Z_IMAGE = {
    f"{block}.#.attention.{theirs}": tuple(f"{block}.#.attention.{name}" for name in ours)
    for block in ("layers", "noise_refiner", "context_refiner")
    for theirs, ours in (("qkv", _QKV), ("out", ("to_out.0",)))
} | {
    name: (name,)
    for block in ("layers", "noise_refiner", "context_refiner")
    for name in _of(f"{block}.#.feed_forward", ("w1", "w2", "w3"))
}

# What ComfyUI reads (comfy/lora.py at 17358c8): layers of Stable Diffusion 1, 2 and XL as `lora_unet_<layer>`, dots as underscores, those
# of Stable Diffusion 3, FLUX, Qwen-Image and Z-Image as `transformer.<layer>`, both as diffusers names them, and any layer as
# `diffusion_model.<layer>` as its authors name it.
COMFYUI = {
    "UNet2DConditionModel": Names("lora_unet_", flat=True),
    "SD3Transformer2DModel": Names("transformer."),
    "FluxTransformer2DModel": Names("transformer."),
    "Flux2Transformer2DModel": Names("transformer."),
    "QwenImageTransformer2DModel": Names("transformer."),
    "ZImageTransformer2DModel": Names("transformer."),
    "LTXVideoTransformer3DModel": Names("diffusion_model."),
    "WanTransformer3DModel": Names("diffusion_model.", renames=WAN),
    "HunyuanVideoTransformer3DModel": Names("diffusion_model.", joined=HUNYUAN),
}
# kohya's sd-scripts, and musubi-tuner for what came later: the authors' layers.
KOHYA = {
    "UNet2DConditionModel": Names("lora_unet_", flat=True),
    "SD3Transformer2DModel": Names("lora_unet_", flat=True, joined=SD3),
    "FluxTransformer2DModel": Names("lora_unet_", flat=True, joined=FLUX),
    "Flux2Transformer2DModel": Names("lora_unet_", flat=True, joined=FLUX2),
    "QwenImageTransformer2DModel": Names("lora_unet_", flat=True),
    "ZImageTransformer2DModel": Names("lora_unet_", flat=True, joined=Z_IMAGE),
    "WanTransformer3DModel": Names("lora_unet_", flat=True, renames=WAN),
    "HunyuanVideoTransformer3DModel": Names("lora_unet_", flat=True, joined=HUNYUAN),
}
# Outputs of a layer that may have no LoRA, over those of the one before it in the same row: FLUX's and HunyuanVideo's mlp_ratio.
WIDER = {"proj_mlp": 4}


_DOTTED = ("base_model.model.", "diffusion_model.", "", "transformer.", "unet.")
_FLAT = ("lora_unet_", "lora_transformer_", "lycoris_")
# What tools call text encoders in flat names, and which of a pipeline's components that is; the first that has the layer.
_ENCODERS = {
    "lora_te_": ("text_encoder",),
    "lora_te1_": ("text_encoder",),
    "lora_te2_": ("text_encoder_2",),
    "lora_te3_": ("text_encoder_3", "text_encoder_2"),
}
# Parts of transformers' names, and what old diffusers' attention processors made of them.
_PROCESSORS = (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("out_proj", "to_out.0"))


class Spelled:
    """The layers of a pipeline's components by every name that tools have for them; a name may stand for several, whose outputs it has one
    after another."""

    def __init__(self, components: Mapping[str, Collection[str]]) -> None:
        self._found: dict[str, tuple[str, tuple[str, ...]] | None] = {}
        self.encoders = any(component.startswith("text_encoder") for component in components)
        for component, layers in components.items():
            if component.startswith("text_encoder"):
                self._encoder(component, layers)
            else:
                self._denoiser(component, layers)

    def _denoiser(self, component: str, layers: Collection[str]) -> None:
        names = {layer: (layer,) for layer in layers}
        for layer in layers:
            names[Names("", renames=WAN)(layer)] = (layer,)
        names |= {theirs: (layer,) for theirs, layer in unet_blocks(layers).items()}
        for name, several in (names | fused(layers)).items():
            flat = {f"{prefix}{name.replace('.', '_')}" for prefix in _FLAT}
            for full in {f"{prefix}{name}" for prefix in _DOTTED} | flat:
                self._add(full, component, several)

    def _encoder(self, component: str, layers: Collection[str]) -> None:
        prefixes = [prefix for prefix, several in _ENCODERS.items() if component in several]
        for layer in layers:
            # transformers 5 calls them without, files with what came before.
            for name in {layer, f"text_model.{layer}", layer.removeprefix("text_model.")}:
                older = next(
                    (name.removesuffix(new) + old for new, old in _PROCESSORS if name.endswith(f"self_attn.{new}")),
                    name,
                )
                for full in {f"{component}.{name}", f"{component}.{older}"}:
                    self._add(full, component, (layer,))
                for prefix in prefixes:
                    full = prefix + name.replace(".", "_")
                    if full not in self._found or component == _ENCODERS[prefix][0]:
                        self._found[full] = component, (layer,)

    def _add(self, full: str, component: str, several: tuple[str, ...]) -> None:
        # Two layers of one name in a file that has underscores for dots: neither can be told.
        place = component, several
        self._found[full] = place if self._found.get(full, place) == place else None

    def layers(self, name: str) -> tuple[str, tuple[str, ...]] | None:
        """The component, and diffusers' names of the layers, that a name stands for; None if there are none or they cannot be told."""
        return self._found.get(name)


# Parts of a residual block and of a U-Net: diffusers' names -> the authors'.
_UNET_PARTS = (
    *(("conv1", "in_layers.2"), ("conv2", "out_layers.3"), ("time_emb_proj", "emb_layers.1")),
    ("conv_shortcut", "skip_connection"),
)
_UNET = {
    **{"conv_in": "input_blocks.0.0", "conv_out": "out.2"},
    **{f"time_embedding.linear_{k}": f"time_embed.{2 * k - 2}" for k in (1, 2)},
    **{f"add_embedding.linear_{k}": f"label_emb.0.{2 * k - 2}" for k in (1, 2)},
}


def unet_blocks(layers: Collection[str]) -> dict[str, str]:
    """The authors' names of a U-Net's layers, which count blocks through -> diffusers', which count them within each resolution.

    A resolution has its residual blocks, each with the transformer after it, and one block more that halves it; on the way up what doubles
    it is in the last of them.
    """
    down, up = (
        len({name.split(".")[3] for name in layers if name.startswith(f"{way}_blocks.0.resnets.")})
        for way in ("down", "up")
    )
    found = {_UNET[layer]: layer for layer in layers if layer in _UNET}
    for layer in layers:
        match = re.fullmatch(
            r"(down|up|mid)_block(?:s\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", layer
        )
        if match is None:
            continue
        way, block, kind, number, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
        if kind == "resnets":
            rest = dict(_UNET_PARTS).get(rest, rest)
        place = 1 if kind == "attentions" else 0
        if way == "mid":
            name = f"middle_block.{1 if place else 2 * number}.{rest}"
        elif way == "down":
            last = kind == "downsamplers"
            name = (
                f"input_blocks.{1 + (down + 1) * block + (down if last else number)}.{place}.{'op' if last else rest}"
            )
        else:
            last = kind == "upsamplers"
            there = any(other.startswith(f"up_blocks.{block}.attentions.") for other in layers)
            name = f"output_blocks.{up * block + (up - 1 if last else number)}.{1 + there if last else place}.{rest}"
        found[name] = layer
    return found


def fused(layers: Collection[str]) -> dict[str, tuple[str, ...]]:
    """The authors' names of layers that blocks have -> diffusers' of what is in them, if all of that is there."""
    flux = any(layer.startswith("single_transformer_blocks.") for layer in layers)
    tables = (HUNYUAN, FLUX2) if flux else (SD3, Z_IMAGE)
    found: dict[str, tuple[str, ...]] = {}
    for table in tables:
        for theirs, ours in table.items():
            for number in sorted({part for layer in layers for part in re.findall(r"\.(\d+)\.", layer)}, key=int):
                names = tuple(name.replace("#", number) for name in ours)
                if all(name in layers for name in names):
                    found[theirs.replace("#", number)] = names
    return found


def joined(table: dict[str, tuple[str, ...]], layers: Collection[str]) -> dict[str, tuple[str, ...]]:
    """The authors' names of layers -> diffusers' names of what is in them, of all that has one of some layers of ours.

    Raises:
        ValueError: for a layer that the table does not have.
    """
    found: dict[str, tuple[str, ...]] = {}
    places = {ours: theirs for theirs, several in table.items() for ours in several}
    for layer in layers:
        number = next(iter(re.findall(r"\.(\d+)\.", layer)), "")
        theirs = places.get(re.sub(r"\.\d+\.", ".#.", layer, count=1))
        if theirs is None:
            raise ValueError(f"layer {layer} has no name there")
        found[theirs.replace("#", number)] = tuple(name.replace("#", number) for name in table[theirs])
    return found
