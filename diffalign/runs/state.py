"""All that a run needs to go on, as a checkpoint's files: tensors and shadows (safetensors), the optimiser's state (torch, loaded with
`weights_only=True`), and the rest as JSON. Randomness needs no state: every draw is keyed by (seed, update, sample).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.errors import Fault, one_line
from diffalign.protocols import TrainablePolicy
from diffalign.rules import Rule
from diffalign.runs.budget import Spent
from diffalign.runs.store import FORMAT, STATE, Store
from diffalign.runtime.files import share, write_text
from diffalign.training.selection import Selector

TENSORS, OPTIMIZER = "tensors.safetensors", "optimizer.pt"


@dataclass(frozen=True)
class RunState:
    """All that a run needs to go on.

    update: how many are done; rule, selector: their `state_dict`; micro_batch: as large as memory sufficed for; skipped: updates with a
    gradient that was not finite; digests: of what the run was begun with, by what it is; settings: the resolved config; given: its keys
    that the user named; history: what was changed on the way, and after which update; logs: digests of the log files; spent: what it took
    so far.
    """

    update: int
    parameters: dict[str, Tensor]
    shadows: dict[str, dict[str, Tensor]]
    optimizer: dict[str, Any]
    rule: dict[str, Any]
    micro_batch: int
    selector: dict[str, Any] = field(default_factory=dict)
    skipped: int = 0
    digests: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    given: list[str] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    logs: dict[str, str] = field(default_factory=dict)
    spent: Spent = field(default_factory=Spent)

    def facts(self) -> dict[str, Any]:
        """What is no tensor, JSON-serialisable."""
        tensors = {"parameters", "shadows", "optimizer"}
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in tensors}
        if not self.selector:  # as checkpoints were before there were selectors
            del values["selector"]
        return values | {"spent": asdict(self.spent)}


def save(
    store: Store, state: RunState, keep: int, best: int | None = None, beside: Callable[[Path, int], None] | None = None
) -> Path:
    """Write a checkpoint and drop all but the newest `keep` and that of update `best`; `beside` adds files to its folder.

    Raises:
        Fault: if it cannot be written or reads back differently; what was there before stays.
    """
    final = store.place(state.update)
    try:
        aside = store.aside(state.update)
        tensors = {f"parameters/{k}": v.detach().cpu().contiguous() for k, v in state.parameters.items()}
        for name, shadow in state.shadows.items():
            tensors |= {f"shadows/{name}/{k}": v.cpu().contiguous() for k, v in shadow.items()}
        save_file(tensors, aside / TENSORS)
        share(aside / TENSORS)
        torch.save(state.optimizer, aside / OPTIMIZER)
        back = load_file(aside / TENSORS)
        if back.keys() != tensors.keys() or not all(torch.equal(back[k], v) for k, v in tensors.items()):
            raise Fault(f"checkpoint: {final} reads back differently from what was written")
        write_text(aside / STATE, json.dumps({"format": FORMAT, "state": state.facts()}))
        if beside is not None:
            beside(aside, state.update)
        store.put(aside, state.update)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        raise Fault(f"checkpoint: cannot write {final}: {one_line(error)}") from error
    store.thin(keep, best)
    return final


def load(store: Store, path: Path) -> RunState:
    """Read a whole checkpoint of this format or an earlier one.

    Raises:
        UserError: if a version of diffalign wrote it that this one cannot follow.
    """
    facts = store.facts(path)
    parameters: dict[str, Tensor] = {}
    shadows: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(path / TENSORS).items():
        kind, _, rest = name.partition("/")
        if kind == "parameters":
            parameters[rest] = tensor
        else:
            shadow, _, key = rest.partition("/")
            shadows.setdefault(shadow, {})[key] = tensor
    optimizer = torch.load(path / OPTIMIZER, weights_only=True)
    spent = Spent(**facts["spent"])
    return RunState(parameters=parameters, shadows=shadows, optimizer=optimizer, **{**facts, "spent": spent})


@torch.no_grad()
def restore(
    state: RunState, policy: TrainablePolicy, optimizer: torch.optim.Optimizer, rule: Rule, selector: Selector
) -> None:
    """Put a state's tensors and what rule and selector learnt back where they were; the optimiser keeps the settings it was made with."""
    for name, parameter in policy.parameters.items():
        parameter.copy_(state.parameters[name])
    for name, shadow in state.shadows.items():
        policy.shadows[name] = {k: v.to(policy.parameters[k].device) for k, v in shadow.items()}
    policy.micro_batch = state.micro_batch
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state.optimizer)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    rule.load_state_dict(state.rule)
    selector.load_state_dict(state.selector)
