"""Pipelines from their configs alone, with random weights."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from diffalign.errors import UserError
from diffalign.models.lora import quiet

LARGEST = 200_000_000  # parameters that are built to be counted


def random_pipeline(folder: Path) -> Any:
    """The pipeline of a folder with random weights: configs are read, weights are not.

    Raises:
        UserError: if its largest component is too big to build.
    """
    from diffusers import DiffusionPipeline

    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    parts: dict[str, Any] = {}
    for name, spec in index.items():
        if not isinstance(spec, list):
            continue
        library, kind = spec
        parts[name] = None if kind is None else _component(folder / name, library, kind)
    cls = getattr(importlib.import_module("diffusers"), index["_class_name"])
    pipe: DiffusionPipeline = cls(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _component(folder: Path, library: str, kind: str) -> Any:
    cls = getattr(importlib.import_module(library), kind)
    if hasattr(cls, "load_config") and hasattr(cls, "from_config"):  # diffusers models and schedulers
        config = cls.load_config(folder)
        if issubclass(cls, torch.nn.Module):
            with torch.device("meta"):
                _check_size(cls.from_config(config), folder)
        made = cls.from_config(config)
    elif (
        hasattr(cls, "config_class")
        and cls.config_class is not None
        and hasattr(cls, "from_pretrained")
        and issubclass(cls, torch.nn.Module)
    ):
        made = cls(cls.config_class.from_pretrained(folder))
        _check_size(made, folder)
    else:
        return cls.from_pretrained(folder)
    return made.requires_grad_(False).eval() if isinstance(made, torch.nn.Module) else made


def _check_size(module: Any, folder: Path) -> None:
    if isinstance(module, torch.nn.Module) and (n := sum(p.numel() for p in module.parameters())) > LARGEST:
        raise UserError(
            f"model: {folder} has {n / 1e6:.0f} M parameters; plan builds components of at most {LARGEST / 1e6:.0f} M"
        )


def shell(folder: Path, kind: str, dtype: torch.dtype) -> Any:
    """A network of one of diffusers' classes without weights, from its folder's config: it takes no memory. None for another class."""
    import diffusers

    made = getattr(diffusers, kind, None)
    if not (isinstance(made, type) and issubclass(made, torch.nn.Module)):
        return None
    with torch.device("meta"):
        return made.from_config(made.load_config(folder)).to(dtype)  # type: ignore[attr-defined]


def alike(folder: Path, kind: str, settings: dict[str, Any]) -> bool:
    """Whether a folder's config is of one of diffusers' classes with these settings and the defaults of all others."""
    import diffusers

    own = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if own.get("_class_name") != kind:
        return False
    parameters = inspect.signature(getattr(diffusers, kind).__init__).parameters.items()
    defaults = {key: p.default for key, p in parameters if p.default is not inspect.Parameter.empty}
    said = ((own.get(key, defaults.get(key)), value) for key, value in {**defaults, **settings}.items())
    return all(json.dumps(mine, default=str) == json.dumps(theirs, default=str) for mine, theirs in said)


@contextmanager
def meta(precision: str) -> Iterator[None]:
    """Make what is made on the meta device, where it takes no memory, and in a precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, precision))
    try:
        with torch.device("meta"), quiet():
            yield
    finally:
        torch.set_default_dtype(before)


def component(kind: str, settings: dict[str, Any]) -> Any:
    """A model of one of diffusers' classes, frozen, from the settings of its config."""
    import diffusers

    return getattr(diffusers, kind)(**settings).requires_grad_(False)
