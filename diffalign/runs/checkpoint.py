"""Checkpoints that are whole or absent: written aside, read back, renamed.

A checkpoint is a folder `checkpoints/update_000010` with the trained tensors and shadows (safetensors), the optimiser's state
(torch, loaded with `weights_only=True`), and `state.json` with the position, the rule's state and every file's SHA-256. Randomness needs
no state: every draw is keyed by (seed, update, sample).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.errors import Fault, UserError, one_line
from diffalign.protocols import TrainablePolicy
from diffalign.rules import Rule
from diffalign.runs.budget import Spent
from diffalign.runtime.files import sync, write_text

STATE = "state.json"
FORMAT = (
    3  # of `state.json`; a change needs a new number, an entry in `MIGRATE`, and stored runs in tests/runs/old_runs
)


@dataclass(frozen=True)
class RunState:
    """All that a run needs to go on.

    update: how many are done; rule: its `state_dict`; micro_batch: as large as memory sufficed for; skipped: updates with a gradient that
    was not finite; prompts, weights: digests of what the run was begun with; spent: what it took so far.
    """

    update: int
    parameters: dict[str, Tensor]
    shadows: dict[str, dict[str, Tensor]]
    optimizer: dict[str, Any]
    rule: dict[str, Any]
    micro_batch: int
    skipped: int = 0
    prompts: str = ""
    weights: str = ""
    spent: Spent = field(default_factory=Spent)

    def facts(self) -> dict[str, Any]:
        """What is no tensor, JSON-serialisable."""
        tensors = {"parameters", "shadows", "optimizer"}
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in tensors}
        return values | {"spent": asdict(self.spent)}


def _from_2(header: dict[str, Any]) -> dict[str, Any]:
    """Format 2 had `notes` without names of their own, and did not know what a run had taken."""
    notes = header["notes"]
    return {"update": header["update"], **notes, "spent": {"updates": header["update"]}}


# format -> the facts of a header of that format, as the next one has them
MIGRATE: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {2: _from_2}


def _name(update: int) -> str:
    return f"update_{update:06d}"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def save(folder: Path, state: RunState, keep: int, best: int | None = None) -> Path:
    """Write a checkpoint under `folder` and drop all but the newest `keep` and that of update `best`.

    Raises:
        Fault: if it cannot be written or reads back differently; what was there before stays.
    """
    final = folder / _name(state.update)
    aside = folder / f".{final.name}.part"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        tensors = {f"parameters/{k}": v.detach().cpu().contiguous() for k, v in state.parameters.items()}
        for name, shadow in state.shadows.items():
            tensors |= {f"shadows/{name}/{k}": v.cpu().contiguous() for k, v in shadow.items()}
        save_file(tensors, aside / "tensors.safetensors")
        torch.save(state.optimizer, aside / "optimizer.pt")
        files = {path.name: _digest(path) for path in sorted(aside.iterdir())}
        back = load_file(aside / "tensors.safetensors")
        if back.keys() != tensors.keys() or not all(torch.equal(back[k], v) for k, v in tensors.items()):
            raise Fault(f"checkpoint: {final} reads back differently from what was written")
        header = {"format": FORMAT, "files": files, "state": state.facts()}
        write_text(aside / STATE, json.dumps(header))
        for path in (*sorted(aside.iterdir()), aside):
            sync(path)
        if final.exists():
            shutil.rmtree(final)
        aside.rename(final)
        sync(folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        raise Fault(f"checkpoint: cannot write {final}: {one_line(error)}") from error
    for old in complete(folder)[:-keep]:
        if best is None or old.name != _name(best):
            shutil.rmtree(old, ignore_errors=True)
    return final


def complete(folder: Path) -> list[Path]:
    """Checkpoints that are whole, oldest first; damaged ones are left out."""
    return [path for path in sorted(folder.glob("update_*")) if _whole(path)]


def _whole(path: Path) -> bool:
    try:
        files = json.loads((path / STATE).read_text(encoding="utf-8"))["files"]
        return all(_digest(path / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError):
        return False


def load(path: Path) -> RunState:
    """Read a whole checkpoint of this format or an earlier one.

    Raises:
        UserError: if a version of diffalign wrote it that this one cannot follow.
    """
    header = json.loads((path / STATE).read_text(encoding="utf-8"))
    written = header.get("format")
    if written != FORMAT and written not in MIGRATE:
        known = ", ".join(map(str, sorted([*MIGRATE, FORMAT])))
        raise UserError(
            f"run_dir: {path} was written by another version of diffalign (format {written}, this one reads {known}); "
            "use that version, choose another run_dir, or --fresh"
        )
    facts = header["state"] if written == FORMAT else header
    for older in range(written, FORMAT):
        facts = MIGRATE[older](facts)
    parameters: dict[str, Tensor] = {}
    shadows: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(path / "tensors.safetensors").items():
        kind, _, rest = name.partition("/")
        if kind == "parameters":
            parameters[rest] = tensor
        else:
            shadow, _, key = rest.partition("/")
            shadows.setdefault(shadow, {})[key] = tensor
    optimizer = torch.load(path / "optimizer.pt", weights_only=True)
    spent = Spent(**facts["spent"])
    return RunState(parameters=parameters, shadows=shadows, optimizer=optimizer, **{**facts, "spent": spent})


def newest(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint; damaged ones are named and passed over. None if there never was one.

    Raises:
        UserError: if there are some and none is whole.
    """
    whole = complete(folder)
    damaged = sorted(set(folder.glob("update_*")) - set(whole))
    for path in damaged:
        say(f"{path} is damaged and passed over")
    if damaged and not whole:
        raise UserError(
            f"run_dir: no checkpoint of {folder.parent} is whole; choose another run_dir, or --fresh to start over"
        )
    return whole[-1] if whole else None


@torch.no_grad()
def restore(state: RunState, policy: TrainablePolicy, optimizer: torch.optim.Optimizer, rule: Rule) -> None:
    """Put a state's tensors and the rule's memory back where they were."""
    for name, parameter in policy.parameters.items():
        parameter.copy_(state.parameters[name])
    for name, shadow in state.shadows.items():
        policy.shadows[name] = {k: v.to(policy.parameters[k].device) for k, v in shadow.items()}
    policy.micro_batch = state.micro_batch
    optimizer.load_state_dict(state.optimizer)
    rule.load_state_dict(state.rule)
