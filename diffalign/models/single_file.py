"""Components of a pipeline from a single file, as other tools save them: the denoiser, and what else the file holds.

The model names the pipeline, its settings and tokenizers; what the file lacks is the model's own.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffalign.errors import UserError, one_line
from diffalign.models import lora as adapters
from diffalign.runtime.files import is_file

# What such files put before the names of an autoencoder's weights, and of text encoders'.
AUTOENCODER = ("first_stage_model.", "vae.")
ENCODERS = ("cond_stage_model.", "conditioner.", "text_encoders.")


@dataclass(frozen=True)
class Read:
    """Components from a file by their names in the pipeline, and the beginnings of names in it that belong to none of them."""

    components: dict[str, Any]
    left: tuple[str, ...] = ()

    def __str__(self) -> str:
        left = f"; not read: {', '.join(self.left)}" if self.left else ""
        return f"{', '.join(self.components)}{left}"


def read(path: str, folder: str, dtype: torch.dtype, bits: Any = None, without: Collection[str] = ()) -> Read:
    """What a single file holds of a folder's pipeline, its denoiser quantised by `bits`, see
    `quantizing.settings`; nothing is made of components `without`.

    Raises:
        UserError: if it cannot be read, or does not fit.
    """
    import diffusers
    from diffusers.loaders.single_file_utils import load_single_file_checkpoint

    if not is_file(Path(path)):
        raise UserError(f"weights: got {path!r}, no file there; allowed is a .safetensors or .ckpt file")
    index = {
        name: spec
        for name, spec in diffusers.DiffusionPipeline.load_config(folder).items()
        if isinstance(spec, (list, tuple)) and spec[0]
    }
    names = [name for name in adapters.DENOISERS if name in index]
    if len(names) != 1:
        raise UserError(f"weights: {folder} has {len(names)} denoisers ({', '.join(names)}), a single file fills one")
    kind = index[names[0]][1]
    with adapters.quiet():
        try:
            content = load_single_file_checkpoint(path)
        except Exception as error:  # each format has its own
            raise UserError(f"weights: cannot read {path!r} as a {kind}: {one_line(error)}") from error
        components: dict[str, Any] = {}
        if names[0] not in without:
            components[names[0]] = _component(path, content, folder, names[0], kind, dtype, bits)
        if "vae" in index.keys() - set(without) and _begins(content, AUTOENCODER):
            components["vae"] = _component(path, content, folder, "vae", index["vae"][1], dtype)
        for name, (library, encoder) in index.items():
            wanted = library == "transformers" and name.startswith("text_encoder") and name not in without
            if wanted and _has_encoder(content, encoder):
                components[name] = _encoder(path, content, folder, name, encoder, dtype)
    return Read(components, _left(content, [*components, *without]))


def _begins(content: dict[str, Any], prefixes: tuple[str, ...]) -> bool:
    return any(key.startswith(prefixes) for key in content)


def _component(
    path: str, content: dict[str, Any], folder: str, name: str, kind: str, dtype: torch.dtype, bits: Any = None
) -> Any:
    """A diffusers model from the file."""
    import diffusers

    try:
        made = getattr(diffusers, kind).from_single_file(
            dict(content), config=folder, subfolder=name, torch_dtype=dtype, quantization_config=bits
        )
    except Exception as error:  # not a checkpoint, one of another model, a class without single files
        raise UserError(
            f"weights: cannot read {path!r} as a {kind} of {folder}; is it of another model? ({one_line(error)})"
        ) from error
    return _whole(path, made, kind)


def _has_encoder(content: dict[str, Any], kind: str) -> bool:
    """Whether the file holds a text encoder of a class that diffusers can read from it."""
    import transformers
    from diffusers.loaders import single_file_utils as utils

    made = getattr(transformers, kind)
    return utils.is_clip_model_in_single_file(made, content) or (
        kind.startswith("T5") and utils.is_t5_in_single_file(content)
    )


def _encoder(path: str, content: dict[str, Any], folder: str, name: str, kind: str, dtype: torch.dtype) -> Any:
    """A text encoder from the file."""
    import transformers
    from diffusers.loaders import single_file_utils as utils

    make = utils.create_diffusers_clip_model_from_ldm
    if kind.startswith("T5"):
        make = utils.create_diffusers_t5_model_from_checkpoint
    try:
        made = make(getattr(transformers, kind), dict(content), name, folder, dtype)
    except Exception as error:  # sizes of another model
        raise UserError(f"weights: cannot read {path!r} as the {name}, a {kind}: {one_line(error)}") from error
    return _whole(path, made, kind)


def _whole(path: str, module: Any, kind: str) -> Any:
    """The module, unless the file left some of its weights without values, of which diffusers says nothing."""
    missing = [name for name, value in module.state_dict().items() if value.is_meta]
    if missing:
        raise UserError(
            f"weights: {path!r} lacks {len(missing)} weights of a {kind}, such as {missing[0]}: it is of another model"
        )
    return module


def _left(content: dict[str, Any], components: Collection[str]) -> tuple[str, ...]:
    """Beginnings of names of an autoencoder's or text encoders' weights that nothing was made of."""
    parts = {".".join(key.split(".")[:2]) for key in content if key.startswith(ENCODERS)}
    encoders = [name for name in components if name.startswith("text_encoder")]
    left = sorted(parts) if parts and not encoders else []
    if "vae" not in components:
        left += [prefix for prefix in AUTOENCODER if _begins(content, (prefix,))]
    return tuple(left)
