"""From a model's name to a pipeline: embedded ones, folders, the hub."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from diffalign.errors import UserError, one_line, shortened
from diffalign.models import hub_files, quantizing, single_file, untrained
from diffalign.models import lora as adapters
from diffalign.runtime.device import settle
from diffalign.runtime.files import fingerprint

# What pipelines that start from a picture or a video are called.
_VARIANT = re.compile(r"[\w-]+\.(?!index|safetensors)(\w+?)(?:-\d{5}-of-\d{5})?\.safetensors")

_OTHER_NETWORKS = ("image_encoder", "safety_checker")  # of transformers, besides text encoders
Part = Literal["all", "encoders", "rest"]
OTHER_TASKS = re.compile("ImageToVideo|Image2Video|VideoToVideo|Img2Img|Inpaint|Edit|Kontext|Control|Upscale|Pix2Pix")


@dataclass(frozen=True)
class Place:
    """A diffusers folder, the commit of the hub's repository that it is, None for others, what a single file put into it, and a name
    for that file's content."""

    folder: str
    commit: str | None = None
    file: str = ""
    digest: str = ""


def locate(model: str, revision: str | None = None) -> Place:
    """The folder of an embedded pipeline, of the user's own, or of a hub id, which is fetched unless it is in the hub's cache.

    Raises:
        UserError: if there is nothing to load under that name, or the hub refuses it.
    """
    from diffusers import DiffusionPipeline

    from diffalign.shapes import models

    if own := models.path(model):
        return Place(str(own))
    if Path(model).exists() or model.count("/") != 1:
        return Place(model)
    try:
        with adapters.quiet():
            folder = DiffusionPipeline.download(model, revision=revision)
    except Exception as error:  # a missing hub, a gated id, an unknown revision: each library has its own
        raise UserError(f"model: {_refusal(model, revision, error)}") from error
    return Place(str(folder), Path(folder).name)


def _refusal(model: str, revision: str | None, error: Exception) -> str:
    """What the user can do about a model that cannot be had."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return hub_files.refusal(model, revision, error) or (
        f"cannot fetch {model!r} from the hub ({type(error).__name__}); there is no folder of that name, and it is not in the hub's "
        f"cache ({HF_HUB_CACHE}) either: connect, or give the folder of a copy"
    )


def variant(folder: Path) -> str | None:
    """The variant of files of which a folder's parts have nothing else, such as `fp16`; None for plain files."""
    kinds = {path.parent: set[str]() for path in folder.glob("*/*.safetensors")}
    for path in folder.glob("*/*.safetensors"):
        found = _VARIANT.fullmatch(path.name)
        kinds[path.parent].add(found[1] if found else "")
    names = {name for found in kinds.values() if "" not in found for name in found}
    return min(names, default=None)


class _Once(logging.Filter):
    """Lets one message through that a prompt was cut, and says it in our words."""

    told = False

    def filter(self, record: logging.LogRecord) -> bool:
        if "truncated because" not in (said := record.getMessage()):
            return True
        if _Once.told:
            return False
        _Once.told, lost = True, shortened(said.rpartition(":")[2], 80)
        record.msg, record.args = f"prompts longer than the text encoder takes are cut, here: {lost}; said once", ()
        return True


def say_truncation_once() -> None:
    """diffusers says it twice a batch."""
    for handler in logging.getLogger("diffusers").handlers:
        if not any(isinstance(known, _Once) for known in handler.filters):
            handler.addFilter(_Once())


def attend(pipe: Any, backend: str) -> None:
    """Let the denoisers attend by another backend of diffusers' than torch's own choice.

    Raises:
        UserError: if it does not run here, or a denoiser's attention has no choice.
    """
    if backend == "xformers" and not torch.cuda.is_available():
        raise UserError("attention: got 'xformers', which needs a CUDA device; allowed here is native")
    for name, module in adapters.denoisers(pipe).items():
        processors = [getattr(part, "processor", None) for part in module.modules()]
        try:
            # Newer models choose at each call; older ones have other processors for it.
            if any(hasattr(processor, "_attention_backend") for processor in processors):
                with adapters.quiet():
                    module.set_attention_backend(backend)
            elif backend == "xformers":
                module.enable_xformers_memory_efficient_attention()
            else:
                raise NotImplementedError(f"a {type(module).__name__} has no choice of backends")
        except (ImportError, RuntimeError, ValueError, NotImplementedError) as error:
            raise UserError(
                f"attention: the {name} cannot attend by {backend} ({one_line(error)}); allowed is native"
            ) from error


def load(
    model: str,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    revision: str | None = None,
    weights: str | None = None,
    quantize: str = "none",
    part: Part = "all",
) -> tuple[Any, Place]:
    """A pipeline from a hub id, a local folder or the name of an embedded one, frozen and ready; and where it was.

    weights: a single file, as other tools save models, whose parts take the place of the model's; quantize: the denoisers, see
    `quantizing.settings`; part: its text encoders alone, its other networks being shells without weights; or the rest, without them.

    Raises:
        UserError: if there is nothing to load under that name, or it starts from a picture.
    """
    import diffusers

    quantizing.check(quantize, device)
    settle(device)
    place, bits = locate(model, revision), quantizing.settings(quantize, dtype)
    try:
        with adapters.quiet():
            index = diffusers.DiffusionPipeline.load_config(place.folder)
            given = _stand_ins(index, Path(place.folder), dtype, part)
            other = single_file.Read({})
            if weights is not None:
                other = single_file.read(weights, place.folder, dtype, bits, given)
            # By its own class: through the base class, components that are optional for it are not taken, silently.
            kind = getattr(diffusers, index["_class_name"], diffusers.DiffusionPipeline)
            pipe = kind.from_pretrained(
                place.folder,
                dtype=dtype,
                variant=variant(Path(place.folder)),
                quantization_config=quantizing.mapped(bits, Path(place.folder)),
                **given,
                **other.components,
            )
    except UserError:
        raise
    except Exception as error:  # a damaged file, a class that diffusers does not have
        raise UserError(f"model: cannot load {model!r}: {one_line(error)}") from error
    if OTHER_TASKS.search(type(pipe).__name__):
        raise UserError(
            f"model: {model!r} is a {type(pipe).__name__}; image-to-image, editing and image-to-video are not there yet, "
            "allowed are pipelines from text to images or video"
        )
    say_truncation_once()
    pipe.set_progress_bar_config(disable=True)
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None  # it paints flagged pictures black, without gradient: no reward could see them
    networks = [component for component in pipe.components.values() if isinstance(component, torch.nn.Module)]
    for network in networks:
        network.requires_grad_(False).eval()
        if part == "encoders" and not any(p.is_meta for p in network.parameters()):
            network.to(device)
    if weights is not None:
        place = replace(place, file=str(other), digest=fingerprint(Path(weights)))
    return (pipe if part == "encoders" else pipe.to(device)), place


def _stand_ins(index: dict[str, Any], folder: Path, dtype: torch.dtype, part: Part) -> dict[str, Any]:
    """What takes the place of components that are not loaded: nothing, or a shell of a network, which says its config."""
    if part == "all":
        return {}
    networks = {name: spec[1] for name, spec in index.items() if isinstance(spec, (list, tuple)) and spec[1]}
    given: dict[str, Any] = {}
    for name, kind in networks.items():
        encoder = name.startswith("text_encoder")
        if part == "rest" and encoder:
            given[name] = None
        elif part == "encoders" and not encoder:
            if (shell := untrained.shell(folder / name, kind, dtype)) is not None:
                given[name] = shell
            elif name in _OTHER_NETWORKS:
                given[name] = None
    return given
