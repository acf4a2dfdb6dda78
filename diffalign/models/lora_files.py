"""LoRA files in diffusers' layout: write, check what was written, read.

A pipeline with two denoisers (experts) has two files, since diffusers' loader takes one at a time.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file

from diffalign.errors import Fault, one_line, shortened
from diffalign.models import halves
from diffalign.models.lora import denoisers, only_trained, quiet
from diffalign.models.lora_kinds import DORA
from diffalign.models.lora_normal import MERGED, dotted
from diffalign.models.lora_pairs import Part, pairs, parts
from diffalign.models.notes import FORMAT, LORA, check_settings, files_of, metadata
from diffalign.models.products import make_lean
from diffalign.runtime.files import share
from diffalign.runtime.memory import out_of_memory


def layers(module: Any, adapter: str = "default") -> Iterator[tuple[str, Any]]:
    """A denoiser's layers that have an adapter, by name."""
    for name, layer in module.named_modules():
        if isinstance(layer, BaseTunerLayer) and adapter in getattr(layer, "lora_A", {}):
            yield name, layer


def save(pipe: Any, folder: Path, notes: dict[str, str]) -> Path:
    """Write the trained LoRA with its alpha, and `notes` as its files' metadata; returns the first file.

    Raises:
        Fault: if that cannot be written, such as on a full disk.
    """
    from safetensors import SafetensorError

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for part in parts(pipe):
            _write(pipe, part, folder, notes)
    except (OSError, SafetensorError) as error:
        raise Fault(f"{folder}: cannot be written ({one_line(error)}); the last checkpoint is kept") from error
    return folder / LORA


def _write(pipe: Any, part: Part, folder: Path, notes: dict[str, str]) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    module, kind = getattr(pipe, part.component), parts(pipe)[0].component  # a second expert's keys are the first's
    # Without the config, alpha is lost and the file loads at another strength. Sets come in another order in every process,
    # and equal adapters should be equal files.
    config = module.peft_config["default"].to_dict()
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    given = {f"{kind}_lora_layers": get_peft_model_state_dict(module), f"{kind}_lora_adapter_metadata": config}
    pipe.save_lora_weights(folder, weight_name=part.file, **given)
    path = folder / part.file
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata() or {})
    save_file(load_file(path), path, metadata={**metadata, **notes})
    _settle(path)


def _settle(path: Path) -> None:
    """Sort a safetensors file's metadata: the library writes it in another order every time, and equal adapters should be
    equal files. The format: eight bytes of length, a JSON header padded with spaces, the tensors."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[start:])
    share(path)


def verify(pipe: Any, folder: Path) -> None:
    """Load a saved LoRA beside the trained one and compare weights and scales.

    Raises:
        Fault: if anything differs; a bad file loads nothing, silently.
    """
    try:
        with quiet():
            for part in parts(pipe):
                pipe.load_lora_weights(folder, weight_name=part.file, adapter_name="saved", **part.options)
        loaded = pipe.get_list_adapters()
        for part in parts(pipe):
            if "saved" not in loaded.get(part.component, []):
                raise Fault(f"{folder / part.file}: loads nothing into {part.component}")
            for name, layer in layers(getattr(pipe, part.component)):
                _compare(name, layer, folder / part.file)
    finally:
        with quiet():
            pipe.delete_adapters("saved")


def _compare(name: str, layer: Any, path: Path) -> None:
    # A half-precision pipeline loads the file in its own precision.
    same = layer.scaling.get("saved") == layer.scaling["default"] and all(
        "saved" in part and torch.equal(part["saved"].weight, part["default"].weight.to(part["saved"].weight.dtype))
        for part in (layer.lora_A, layer.lora_B)
    )
    if not same:
        raise Fault(f"{path}: layer {name} differs from what was trained")


def load(pipe: Any, folder: Path, name: str) -> None:
    """Load a LoRA under a name: a folder's, or a file of another tool.

    Raises:
        ValueError: if a file is missing or damaged, or a layer of it is none of the pipeline's: diffusers leaves it out, silently.
    """
    if (file := _unknown(folder)) is not None:
        return load_file(pipe, file, name)
    for part in parts(pipe):
        named = len(_read(pipe, part, folder, name))
        present = len(list(layers(getattr(pipe, part.component), name)))
        if not present:
            raise ValueError(f"{part.file} names no layer of this model's {part.component}")
        if named > present:
            raise ValueError(f"{part.file} has {named} layers, this model's {part.component} has {present} of them")


def _read(pipe: Any, part: Part, folder: Path, name: str) -> set[str]:
    """Load a part's file; the layers that it names."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (folder / part.file).is_file():
        raise ValueError(f"there is no {part.file} in it, for the model's {part.component}")
    try:
        tensors = load_file(folder / part.file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{part.file} is damaged: {one_line(error)}") from error
    named = halves.layers(tensors, lambda tensor: bool(tensor.isfinite().all()))
    check_settings(metadata(folder / part.file))
    with quiet():
        try:
            pipe.load_lora_weights(folder, weight_name=part.file, adapter_name=name, **part.options)
        except Exception as error:  # whatever the libraries make of a file that is not theirs
            if out_of_memory(error):
                raise
            raise ValueError(
                f"{part.file} is no LoRA that diffusers can load here: {shortened(str(error), 300)}"
            ) from error
    return named


@torch.no_grad()
def go_on_from(pipe: Any, folder: Path) -> None:
    """Give the trained LoRA the effect of a saved one, exactly; its rank may be higher, its strength another. folder: or a file of another
    tool.

    Raises:
        ValueError: if the saved one has a layer or rank that the trained one has not.
    """
    if (file := _unknown(folder)) is not None:
        return go_on_from_file(pipe, file)
    try:
        load(pipe, folder, "start")
        for part in parts(pipe):
            own, given = (dict(layers(getattr(pipe, part.component), name)) for name in ("default", "start"))
            if more := given.keys() - own.keys():
                raise ValueError(f"it has layer {min(more)}, which is not among lora.targets")
            _check_plain(given.values(), "start")
            for layer in given.values():
                a, b = (half["start"].weight for half in (layer.lora_A, layer.lora_B))
                _take(layer, a, b, layer.scaling["start"])
        _check_places(pipe, "start")
    finally:
        with quiet():
            pipe.delete_adapters("start")


def stand_by(pipe: Any, folder: Path, name: str) -> None:
    """Load a LoRA of any rank and layers beside the trained one, frozen, for `lora.acting`; `name` begins with `products.FROZEN`.
    folder: or a file of another tool.

    Raises:
        ValueError: if it does not fit, or is no plain LoRA of the denoisers.
    """
    load(pipe, folder, name)
    for module in denoisers(pipe).values():
        _check_plain([layer for _, layer in layers(module, name)], name)
        make_lean(module)
    _check_places(pipe, name)
    only_trained(pipe)


def _check_plain(given: Iterable[Any], name: str) -> None:
    given = list(given)
    if any(getattr(layer, "use_dora", {}).get(name) for layer in given):
        raise ValueError(f"it is {DORA}; {MERGED}")
    if any(getattr(layer, "lora_bias", {}).get(name) for layer in given):
        raise ValueError("it has biases, which the trained LoRA has no place for")


def _check_places(pipe: Any, name: str) -> None:
    """Refuse an adapter that has layers elsewhere."""
    others = [key for key, names in pipe.get_list_adapters().items() if name in names and key not in denoisers(pipe)]
    if others:
        raise ValueError(f"it has layers of the {others[0]} too, which is not trained here")


def _unknown(place: Path) -> Path | None:
    """A file, or a folder's only one, if another tool wrote it: it has neither notes of ours nor peft's settings, which diffusers reads
    rightly."""
    if place.is_file():
        return place
    path = place / LORA
    if not path.is_file() or len(files_of(place)) > 1:
        return None
    return None if {"notes_format", "base_model", "lora_adapter_metadata"} & metadata(path).keys() else path


def load_file(pipe: Any, path: Path, name: str) -> None:
    """Load a LoRA file of another tool under a name: rewritten as diffusers has it, its strengths in B, and read by diffusers.

    Raises:
        ValueError: if it has anything that the pipeline has no place for.
    """
    ((component, given),) = pairs(pipe, path).items()
    # Layers that are one in a file share it.
    tensors = {key: tensor.clone() for key, tensor in dotted(given, f"{component}.").items()}
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder, LORA), metadata={"notes_format": str(FORMAT)})
        load(pipe, Path(folder), name)


@torch.no_grad()
def go_on_from_file(pipe: Any, path: Path) -> None:
    """Give the trained LoRA the effect of a LoRA file of another tool, exactly; see `lora_normal.read`.

    Raises:
        ValueError: if it has anything that the trained one has no place for.
    """
    ((component, given),) = pairs(pipe, path).items()
    own = dict(layers(getattr(pipe, component)))
    if more := given.keys() - own.keys():
        raise ValueError(f"it has layer {min(more)}, which is not among lora.targets")
    # Before anything is taken, and of all layers: ranks differ in files.
    _check_rank(max(pair.rank for pair in given.values()), next(iter(own.values())))
    for layer, pair in given.items():
        _take(own[layer], pair.down, pair.up, pair.scale)


def _check_rank(rank: int, trained: Any) -> None:
    own = len(trained.lora_A["default"].weight)
    if rank > own:
        raise ValueError(
            f"its rank is {rank}, lora.rank is {own}; allowed is lora.rank={rank} or more, lora.frozen, or, of an adapter of ours, what "
            f"`diffalign export PLACE --rank {own} --format diffusers` makes of it"
        )


def _take(layer: Any, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
    to_a, to_b = (half["default"].weight for half in (layer.lora_A, layer.lora_B))
    _check_rank(len(a), layer)
    if a.shape[1:] != to_a.shape[1:] or len(b) != len(to_b):
        raise ValueError(
            f"a layer's halves are {tuple(a.shape)} and {tuple(b.shape)}, this model's are of another size"
        )
    # scale B A = (alpha / rank) B A: rows beyond the saved rank keep their start, where B is 0 and nothing happens
    to_a[: len(a)] = a.to(to_a)
    to_b[:, : len(a)] = b.to(to_b) * (scale / layer.scaling["default"])
