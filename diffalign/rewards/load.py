"""From a reward's entry to the object that scores."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import operator
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffalign.errors import UserError, shown
from diffalign.rewards import content
from diffalign.rewards.base import Column, Judge, Reward, Wrapped
from diffalign.rewards.catalog import Entry, find
from diffalign.rewards.foreign import adapted
from diffalign.rewards.frames import PerFrame
from diffalign.rewards.isolated import FAILURES, switches, users, why
from diffalign.rewards.remote import Remote
from diffalign.rewards.takes import Unrecognised

Judges = dict[str, Judge]  # by the name of their network


def load(
    name: str,
    deadline: float = 300.0,
    batch: int = 16,
    frames: str = "all",
    reduce: str = "mean",
    device: str | None = None,
    judges: Judges | None = None,
) -> Reward:
    """The reward of a name; those that ship are created without arguments, or with the place of their weights, others as `adapted` says.

    deadline, batch: of `Remote`; frames, reduce: of `PerFrame`, which shows videos to rewards for pictures; device: where a user's reward
    that asks for one is made, None: the first CUDA device, else the CPU; judges: those loaded before, which are used again, and get what is
    loaded: rewards of one judge share it.

    Raises:
        UserError: if its module cannot be imported, lacks the function, or has one whose call cannot be told.
    """
    try:
        entry = find(name)
    except LookupError as error:
        raise UserError(f"rewards: {name}: {error}") from error
    if entry.quantize != "none" and entry.missing:
        raise UserError(f"rewards: {name} needs {entry.missing}")
    if entry.urls:
        return Remote(name, entry.urls, deadline, batch)
    with content.opened() as seen, switches():
        ships = entry.source.startswith("reward_models.")
        if ships:
            reward = _shipped(entry, {} if judges is None else judges)
        else:
            reward = _users(entry, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    reward.background = reward.background or entry.background
    if entry.modality == "image" or not reward.clips:
        inner, reward = reward, PerFrame(reward, frames, reduce)
        reward.recognised, reward.probed = inner.recognised, inner.probed
    reward.foreign = not ships
    reward.files = content.own_files(entry, seen)
    return reward


def _shipped(entry: Entry, judges: Judges) -> Reward:
    """The object of a reward that comes with the tool, or a column of a judge that may be there."""
    if entry.column and entry.network in judges:
        return Column(judges[entry.network], entry.column)
    target = _target(entry, _imported(entry))
    given = [entry.place, entry.quantize] if entry.quantize != "none" else [entry.place] if entry.place else []
    made = _created(entry, target, *given) if inspect.isclass(target) else target
    if entry.column:
        return Column(judges.setdefault(entry.network, made), entry.column)
    return made if isinstance(made, Reward) else Wrapped(made, entry.background)


def _users(entry: Entry, device: str) -> Reward:
    """A user's, in whatever form it is."""
    module = _imported(entry)
    told, where = getattr(module, "TAKES", None), torch.device(device)
    made: Reward = _created(entry, adapted, entry.attribute, _target(entry, module), told, entry.part, where)
    if entry.differentiable and not made.keeps_gradient:
        raise UserError(
            f"rewards: {entry.name}: DIFFERENTIABLE names it, and it takes {made.recognised}; allowed with a gradient are float tensors"
        )
    return made


def _imported(entry: Entry) -> Any:
    try:
        return _module(entry)
    except FAILURES as error:
        raise UserError(f"rewards: {entry.name}: cannot be imported: {why(error)}") from error


def _target(entry: Entry, module: Any) -> Any:
    """What the entry names, which may be a method of it: `thing.score`."""
    try:
        target = operator.attrgetter(entry.attribute)(module)
    except AttributeError:
        what = "is not there"
    else:
        if callable(target):
            return target
        what = f"is {shown(target)}"
    raise UserError(
        f"rewards: {entry.name}: {entry.attribute!r} in {entry.source} {what}, allowed is what can be called"
    )


def _created(entry: Entry, make: Callable[..., Any], *given: Any) -> Any:
    try:
        return make(*given)
    except Unrecognised as error:
        raise UserError(f"rewards: {entry.name}: {error}") from error
    except FAILURES as error:
        raise UserError(f"rewards: {entry.name}: cannot be created: {why(error)}") from error


def _module(entry: Entry) -> Any:
    if not entry.source.endswith(".py"):
        return importlib.import_module(entry.source)
    path = Path(entry.source)
    # Two files of one name are two modules.
    name = f"_diffalign_reward_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    beside = str(path.parent)
    # It may import what stands beside it, as a script may, and not what another reward has beside it under that name.
    near = _names(path.parent)
    for other in [key for key in sys.modules if key.partition(".")[0] in near]:
        if path.parent not in Path(getattr(sys.modules[other], "__file__", None) or "").parents:
            del sys.modules[other]
    sys.path.insert(0, beside)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(beside)
        if beside not in sys.path:
            sys.path.append(beside)  # for imports within its functions
    return module


def _names(folder: Path) -> set[str]:
    """Modules beside a reward that are nobody else's: neither installed nor the interpreter's."""
    names = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    return {name for name in names if name in sys.modules and _user_module(sys.modules[name])}


def _user_module(module: Any) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and users(file)
