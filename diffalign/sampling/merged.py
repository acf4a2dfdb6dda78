"""`diffalign merge`: a base model with adapters in its weights, as a pipeline folder that needs neither peft nor this package."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffalign.errors import Fault, UserError, one_line
from diffalign.models.places import given, parted, place_of
from diffalign.runtime.files import home, make_folder
from diffalign.sampling import sources


def write(target: str, more: Sequence[str], out: Path) -> list[str]:
    """Write it, read it back and compare; returns what to tell.

    Raises:
        UserError: if the folder holds something, an adapter does not fit, or the base is quantised.
        Fault: if it reads back differently, or cannot be written.
    """
    import torch

    from diffalign.models import loading, merging
    from diffalign.models.lora import quiet

    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out: got {str(out)!r}, which holds something; name a new folder")
    source = _source(target, more)
    # As it was trained, unpacked: what is added to 8 or 4 bits would be rounded away.
    pipe, _ = loading.load(source.model, getattr(torch, source.precision), "cpu", source.revision, source.weights)
    adapters = (*source.frozen, *source.adapters)
    try:
        count = merging.merge(pipe, adapters).total()
    except ValueError as error:
        raise UserError(f"merge: {error}") from error
    aside = out.with_name(f".{out.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    make_folder(out.parent, "--out")
    try:
        aside.mkdir()
        with quiet():
            pipe.save_pretrained(aside)
        _compare(pipe, aside, source.precision)
        if out.exists():
            out.rmdir()
        aside.replace(out)
    except OSError as error:
        raise Fault(f"{out}: cannot be written ({one_line(error)})") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    told = ", ".join(f"{key}={value}" for key, value in source.call.items())
    lines = [f"{out}: {source.model} with {len(adapters)} adapter{'s' * (len(adapters) > 1)} in {count} layers"]
    if told:
        lines.append(f"its pictures are those of the adapter with the call that it was trained with: {told}")
    if source.ddim:
        lines.append("it was trained walking DDIM: sample with DDIMScheduler(clip_sample=False, thresholding=False)")
    if source.quantize != "none":
        lines.append(
            f"it was trained on a base in {source.quantize}, here it is in one that is not: pictures differ as the two do"
        )
    return lines


def _source(target: str, more: Sequence[str]) -> sources.Source:
    """A run or adapter, and more; or a model and adapters, which one of the hub is where adapters are given with it."""
    name, _ = parted(home(target))
    if more and place_of(name) is None:
        return sources.resolve(target, 1.0, more)
    first = given(target, "merge")
    return sources.resolve(str(first.folder), first.strength, more)


def _compare(pipe: Any, folder: Path, precision: str) -> None:
    """Hold what was written against what is in memory."""
    import torch

    from diffalign.models import loading

    back, _ = loading.load(str(folder), getattr(torch, precision))
    for name, module in pipe.components.items():
        if not isinstance(module, torch.nn.Module):
            continue
        own, read = module.state_dict(), getattr(back, name).state_dict()
        if own.keys() != read.keys() or not all(torch.equal(own[key], read[key]) for key in own):
            raise Fault(f"{folder / name} reads back differently from what was written")
