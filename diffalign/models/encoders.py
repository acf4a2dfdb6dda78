"""Text encoders before anything else: loaded on their own, asked for every text of a run, and gone before the denoiser comes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diffalign.errors import UserError
from diffalign.models import calls
from diffalign.models.encoding_store import Store
from diffalign.models.encodings import Encodings, Kept, digest
from diffalign.runtime.memory import out_of_memory

PROBE = "a"  # the text that pipelines are tried with


class _Asked(Exception):
    """The pipeline has its encodings: the rest of its call needs what is not there."""


@functools.cache
def versions() -> str:
    """Of the libraries that tokenize and encode."""
    from importlib.metadata import version

    return ", ".join(f"{name} {version(name)}" for name in ("diffusers", "transformers", "tokenizers"))


def present(pipe: Any) -> list[str]:
    """Names of the text encoders that are in memory."""
    parts = pipe.components.items()
    return [name for name, part in parts if name.startswith("text_encoder") and isinstance(part, torch.nn.Module)]


def device_known(pipe: Any, device: torch.device | str) -> type:
    """The pipeline's class with its device answered: its own answer visits every module, at every call."""
    known = torch.device(device)
    answered = property(lambda _: known)
    return type(type(pipe).__name__, (type(pipe),), {"_execution_device": answered, "device": answered})


def encode_all(
    pipe: Any,
    arguments: dict[str, Any],
    device: str,
    folder: Path,
    budget: float,
    texts: Sequence[str],
    mine: Sequence[str],
) -> tuple[Kept | None, str]:
    """Encode `mine`, a share of all texts of a run, as the pipeline's call with these arguments does, and keep them on disk.

    pipe: with its text encoders; of its other networks the configs are enough. budget: bytes on disk.

    Returns:
        What other pipelines get them from, None if it cannot be so; and why the encoders must stay, "" if they need not.

    Raises:
        UserError, Fault: if the folder cannot be written.
    """
    if not hasattr(pipe, "encode_prompt"):
        return None, f"{type(pipe).__name__} has no encode_prompt"
    tokenizers = [part for name, part in pipe.components.items() if name.startswith("tokenizer") and part is not None]
    encoders = [getattr(pipe, name) for name in present(pipe)]
    depends = digest(encoders, tokenizers, type(pipe).__name__, versions())
    encodings = Encodings(pipe.encode_prompt, Store(folder, budget), depends)
    with torch.no_grad():
        _ask(pipe, encodings, arguments, device, PROBE)
        why_not = encodings.prepare([PROBE, *texts], mine)
    return encodings.kept(complete=not why_not), why_not


def _ask(pipe: Any, encodings: Encodings, arguments: dict[str, Any], device: str, text: str) -> None:
    """Let a pipeline's call ask for a text's encodings, which tells what else it passes on, and end it before it prepares latents."""

    def asked(*args: Any, **kwargs: Any) -> Any:
        raise _Asked

    own = type(pipe)
    pipe.__class__, pipe.encode_prompt, pipe.prepare_latents = device_known(pipe, device), encodings, asked
    try:
        inspect.unwrap(own.__call__)(
            pipe, prompt=[text], generator=[torch.Generator().manual_seed(0)], output_type="latent", **arguments
        )
    except _Asked:
        pass
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
        if out_of_memory(error):
            raise
        raise UserError(f"sampler.pipeline_args: {calls.refusal(pipe, 'a prompt', arguments, error, own)}") from error
    finally:
        pipe.__class__ = own
        del pipe.encode_prompt, pipe.prepare_latents
