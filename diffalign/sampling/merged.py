"""`diffalign merge`: a base model with adapters in its weights, as a pipeline folder that needs neither peft nor this package."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffalign.errors import Fault, UserError, one_line
from diffalign.models.places import given, parted, place_of
from diffalign.runtime.files import home, make_folder, share
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

    single = out.suffix == ".safetensors"
    if out.exists() and (single or not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: got {str(out)!r}, which holds something; name a new folder")
    source = _source(target, more)
    if single and Path(source.weights or "").suffix != ".safetensors":
        raise UserError(
            f"--out: got {str(out)!r}, {source.model} is no single file, and diffusers writes none; allowed is a folder, or an adapter "
            "that was trained with `weights`, a .safetensors file"
        )
    # As it was trained, unpacked: what is added to 8 or 4 bits would be rounded away.
    pipe, _ = loading.load(source.model, getattr(torch, source.precision), "cpu", source.revision, source.weights)
    adapters = (*source.frozen, *source.adapters)
    aside = out.with_name(f".part.{out.name}")
    _remove(aside)
    make_folder(out.parent, "--out")
    try:
        if single:
            merging.merge_file(pipe, adapters, Path(str(source.weights)), aside)
        count = merging.merge(pipe, adapters).total()
        if not single:
            aside.mkdir()
            with quiet():
                pipe.save_pretrained(aside)
        for file in [aside] if single else aside.rglob("*.safetensors"):
            share(file)
        _compare(pipe, aside, source, single)
        if out.exists():
            out.rmdir()
        aside.replace(out)
    except ValueError as error:
        raise UserError(f"merge: {error}") from error
    except OSError as error:
        raise Fault(f"{out}: cannot be written ({one_line(error)})") from error
    finally:
        _remove(aside)
    return [
        f"{out}: {source.model} with {len(adapters)} adapter{'s' * (len(adapters) > 1)} in {count} layers",
        *_told(source),
    ]


def _told(source: sources.Source) -> list[str]:
    """How the pipeline is to be called for its pictures to be those of the adapter."""
    told = ", ".join(f"{key}={value}" for key, value in source.call.items())
    lines = []
    if told:
        lines.append(f"its pictures are those of the adapter with the call that it was trained with: {told}")
    if source.call.get(sources.GUIDED) is not None:
        lines.append(
            "of these, a plain call does not take guidance_steps: it guides at every step, and samples otherwise"
        )
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


def _remove(place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    place.unlink(missing_ok=True)


def _compare(pipe: Any, written: Path, source: sources.Source, single: bool) -> None:
    """Hold what was written against what is in memory: equal, or in a file of less precision rounded to that."""
    import torch

    from diffalign.models import loading

    dtype = getattr(torch, source.precision)
    if single:
        back, _ = loading.load(source.model, dtype, "cpu", source.revision, str(written))
    else:
        back, _ = loading.load(str(written), dtype)
    for name, module in pipe.components.items():
        if not isinstance(module, torch.nn.Module):
            continue
        own, read = module.state_dict(), getattr(back, name).state_dict()
        near = 2.0**-8 if single else 0.0  # half a unit of bfloat16's last place, once in the file and once in memory
        if own.keys() != read.keys() or not all(_close(own[key], read[key], near) for key in own):
            raise Fault(f"{written}: the {name} reads back differently from what was written")


def _close(one: Any, two: Any, near: float) -> bool:
    apart, most = (one.float() - two.float()).abs(), near * one.float().abs()
    return bool((apart <= most + near * 1e-3 * one.float().abs().max()).all()) if one.numel() else True
