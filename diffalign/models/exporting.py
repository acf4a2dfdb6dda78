"""`diffalign export`: adapters as one LoRA file in the names and with the notes that a tool reads.

Strengths are multiplied into B, in float32, so that a file acts alike for readers that look at `.alpha`, at metadata or at nothing; where a
format has `.alpha`, it is the rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from diffalign.errors import UserError, one_line, shown
from diffalign.models import file_notes, halves
from diffalign.models.layer_names import COMFYUI, FORMATS, KOHYA, WIDER, Names, joined
from diffalign.models.lora_normal import Pair, dotted
from diffalign.models.notes import LORA, PEFT_CONFIG, PEFT_FILE, Notes, files_of, lora_settings, metadata
from diffalign.models.places import Adapter
from diffalign.runtime.files import is_file, make_folder, share, write_text

Pairs = dict[str, Pair]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Written:
    """A file that was made: how many layers it has, and the share of the difference of weights that a lower rank lost, in the Frobenius
    norm."""

    path: Path
    layers: int
    lost: float = 0.0

    def __str__(self) -> str:
        lost = f", {self.lost:.2%} of the difference lost" if self.lost else ""
        return f"{self.path}: {self.layers} layers{lost}"


def export(
    adapters: Sequence[Adapter], out: Path, form: str = "comfyui", dtype: str = "float32", rank: int | None = None
) -> list[Written]:
    """Write adapters of ours, added up, for another tool; one file for every expert. `peft`: a folder.

    Raises:
        UserError: if there is no adapter of ours, they do not belong together, or the tool cannot read the model's layers.
    """
    if form != "peft" and out.suffix != ".safetensors":
        raise UserError(f"--out: got {str(out)!r}, allowed is a .safetensors file")
    if form == "peft" and (is_file(out) or (out.is_dir() and any(out.iterdir()))):
        raise UserError(f"--out: got {str(out)!r}, which holds something; allowed is a new folder")
    endings = _endings(adapters, out)
    if form == "peft" and len(endings) > 1:
        raise UserError(
            f"--format: got peft, this model has {len(endings)} denoisers, one folder has one; allowed are the others"
        )
    made = []
    for ending in endings:
        read = [_read(adapter.folder / LORA.replace(".safetensors", f"{ending}.safetensors")) for adapter in adapters]
        notes, denoiser = read[0][1], _one([n for _, n, _ in read])
        total = added([(pairs, adapter.strength) for (pairs, *_), adapter in zip(read, adapters, strict=True)])
        pairs, lost = (total, 0.0) if rank is None else lowered(total, rank)
        made.append((ending, pairs, notes, denoiser, read[0][2], lost))
    make_folder(out if form == "peft" else out.parent, "--out")
    found = []
    for ending, pairs, notes, denoiser, component, lost in made:
        target = out / PEFT_FILE if form == "peft" else out.with_name(out.name.removesuffix(".safetensors") + ending)
        target = target if form == "peft" else target.with_name(target.name + ".safetensors")
        tensors = FORM[form](denoiser, component, pairs)
        tensors = {k: v if k.endswith(".alpha") else v.to(DTYPES[dtype]).contiguous() for k, v in tensors.items()}
        _write(target, tensors, file_notes.of(notes, denoiser, pairs, tensors, target.stem))
        if form == "peft":
            write_text(out / PEFT_CONFIG, json.dumps(_peft_config(pairs, notes), indent=1) + "\n")
        found.append(Written(target, len(pairs), lost))
    return found


def _endings(adapters: Sequence[Adapter], out: Path) -> list[str]:
    """What files of an adapter are called after the first one's name: none, or `.transformer_2` too."""
    stem = LORA.removesuffix(".safetensors")
    each = [
        [path.name.removeprefix(stem).removesuffix(".safetensors") for path in files_of(a.folder)] for a in adapters
    ]
    for adapter, endings in zip(adapters, each, strict=True):
        if not adapter.folder.is_dir() or not endings:
            key = "export" if adapter is adapters[0] else "--adapter"
            why = "a file of another tool" if is_file(adapter.folder) else f"no {LORA} there"
            raise UserError(f"{key}: got {str(adapter.folder)!r}, {why}; allowed are runs and adapters of diffalign")
        if endings != each[0]:
            raise UserError(f"--adapter: {adapter.folder} has {len(endings)} files, the first adapter {len(each[0])}")
    for adapter in adapters:
        if out.exists() and any(path.samefile(out) or path.parent.samefile(out) for path in files_of(adapter.folder)):
            raise UserError(f"--out: got {str(out)!r}, which is the adapter itself; name another file")
    return each[0]


def _one(notes: Sequence[Notes]) -> str:
    """The denoiser that adapters are for."""
    kinds = {note.denoisers[0] if note.denoisers else "" for note in notes}
    bases = {note.base_model for note in notes if note.base_model}
    if "" in kinds:
        raise UserError("export: got an adapter that does not say its denoiser; allowed are adapters of diffalign")
    if len(kinds) > 1 or len(bases) > 1:
        raise UserError(f"--adapter: they belong to {' and '.join(sorted(bases or kinds))}; allowed is one model's")
    return kinds.pop()


def _read(path: Path) -> tuple[Pairs, Notes, str]:
    """An adapter's file as pairs by diffusers' names, its notes, and the component that it is for."""
    from safetensors.torch import load_file

    try:
        raw, tensors = metadata(path), load_file(path)
        halves.layers(tensors, lambda tensor: bool(tensor.isfinite().all()))
        notes = Notes.of(raw)
        if "lora_adapter_metadata" not in raw:
            raise UserError(f"export: {path} does not say its alpha")
        settings = lora_settings(raw)
    except (OSError, SafetensorError) as error:
        raise UserError(f"export: {path} is damaged: {one_line(error)}") from error
    except ValueError as error:
        raise UserError(f"export: {path}: {error}") from error
    found: dict[str, dict[str, Tensor]] = {}
    component = ""
    for key, tensor in tensors.items():
        layer, _, half = key.removesuffix(".weight").rpartition(".")
        component, _, name = layer.partition(".")
        if half not in ("lora_A", "lora_B"):
            raise UserError(f"export: {path}: {shown(key)} is no half of a LoRA")
        found.setdefault(name, {})[half] = tensor.float()
    alpha = settings.get(f"{component}.lora_alpha")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
        raise UserError(f"export: {path}: {component} has no alpha")
    pairs = {name: Pair(p["lora_A"], p["lora_B"], alpha / len(p["lora_A"])) for name, p in found.items()}
    return pairs, notes, component


# -- arithmetic on pairs; W + scale B A


def added(given: Sequence[tuple[Pairs, float]]) -> Pairs:
    """The sum of LoRAs with strengths, exactly: B A + B' A' = [B B'] [A; A']; scales are 1."""
    layers = dict.fromkeys(layer for pairs, _ in given for layer in pairs)
    found = {}
    for layer in layers:
        own = [(pairs[layer], strength) for pairs, strength in given if layer in pairs]
        down = torch.cat([pair.down for pair, _ in own])
        up = torch.cat([pair.up * (pair.scale * strength) for pair, strength in own], dim=1)
        found[layer] = Pair(down, up, 1.0)
    return found


def lowered(pairs: Pairs, rank: int) -> tuple[Pairs, float]:
    """The nearest LoRA of a rank, and the share of the difference's norm that it lacks: SVD of B A by QR of its halves, never the whole.

    B A = Q_b R_b R_a^T Q_a^T, and R_b R_a^T is r x r.
    """
    found, all_of_it, kept = {}, 0.0, 0.0
    for layer, pair in pairs.items():
        down, up = (half.flatten(1).double() for half in (pair.down, pair.up))
        q_up, r_up = torch.linalg.qr(up * pair.scale)
        q_down, r_down = torch.linalg.qr(down.t())
        u, s, v = torch.linalg.svd(r_up @ r_down.t())
        few = min(rank, len(s))
        root = s[:few].sqrt()
        new_up, new_down = q_up @ u[:, :few] * root, (root[:, None] * v[:few]) @ q_down.t()
        shapes = (few, *pair.down.shape[1:]), (len(pair.up), few, *pair.up.shape[2:])
        found[layer] = Pair(new_down.float().reshape(shapes[0]), new_up.float().reshape(shapes[1]), 1.0)
        all_of_it += float(s.square().sum())
        kept += float(s[:few].square().sum())
    return found, max(0.0, 1 - kept / all_of_it) ** 0.5 if all_of_it else 0.0


def put_together(pairs: Sequence[Pair | None], outputs: Sequence[int]) -> Pair:
    """Layers that are one elsewhere, outputs one after another: A is all of theirs, B is block-diagonal. None: no LoRA, zeros."""
    present = [pair for pair in pairs if pair is not None]
    down = torch.cat([pair.down for pair in present])
    up = torch.zeros(sum(outputs), len(down))
    row = column = 0
    for pair, size in zip(pairs, outputs, strict=True):
        if pair is not None:
            up[row : row + size, column : column + pair.rank] = pair.up * pair.scale
            column += pair.rank
        row += size
    return Pair(down, up, 1.0)


# -- formats


def _named(names: Names, pairs: Pairs) -> Pairs:
    """Pairs by another tool's names."""
    if names.joined is None:
        return {names(layer): pair for layer, pair in pairs.items()}
    found = {}
    for theirs, ours in joined(names.joined, list(pairs)).items():
        own = [pairs.get(layer) for layer in ours]
        if len(ours) == 1:
            assert own[0] is not None
            found[names(theirs)] = own[0]
            continue
        size = next(
            len(pair.up) // WIDER.get(layer.rpartition(".")[2], 1)
            for layer, pair in zip(ours, own, strict=True)
            if pair is not None
        )
        found[names(theirs)] = put_together(own, [size * WIDER.get(layer.rpartition(".")[2], 1) for layer in ours])
    return found


def _tool(table: Mapping[str, Names], what: str) -> Callable[[str, str, Pairs], dict[str, Tensor]]:
    def tensors(denoiser: str, component: str, pairs: Pairs) -> dict[str, Tensor]:
        if denoiser not in table:
            raise UserError(f"export: got {denoiser}; {what} names are known here for {', '.join(table)}")
        names = table[denoiser]
        try:
            named = _named(names, pairs)
        except ValueError as error:
            raise UserError(f"export: {what} names: {error}") from error
        return _flat(named) if names.flat else dotted(named, "")

    return tensors


def _flat(pairs: Pairs) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for layer, pair in pairs.items():
        found[f"{layer}.lora_down.weight"], found[f"{layer}.lora_up.weight"] = pair.down, pair.up * pair.scale
        found[f"{layer}.alpha"] = torch.tensor(float(pair.rank))
    return found


FORM: dict[str, Callable[[str, str, Pairs], dict[str, Tensor]]] = {
    "comfyui": _tool(COMFYUI, "ComfyUI's"),
    "kohya": _tool(KOHYA, "kohya's"),
    "diffusers": lambda denoiser, component, pairs: dotted(pairs, f"{component}."),
    "peft": lambda denoiser, component, pairs: dotted(pairs, "base_model.model."),
}


assert tuple(FORM) == FORMATS


def _peft_config(pairs: Pairs, notes: Notes) -> dict[str, Any]:
    """peft's adapter_config.json: alpha is the rank of each layer."""
    ranks = {layer: pair.rank for layer, pair in pairs.items()}
    most = max(ranks.values())
    others = {layer: rank for layer, rank in ranks.items() if rank != most}
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": file_notes.public(notes.base_model) or None,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(pairs),
        "bias": "none",
        "inference_mode": True,
    }


def _write(target: Path, tensors: dict[str, Tensor], notes: dict[str, str]) -> None:
    from safetensors.torch import save_file

    try:
        save_file(tensors, target, metadata=notes)
        share(target)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--out: got {str(target)!r}, cannot write there ({one_line(error)})") from error
