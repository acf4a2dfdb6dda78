"""From a reward's entry to the object that scores."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

from diffalign.errors import UserError, shown
from diffalign.rewards import content
from diffalign.rewards.base import Reward, Wrapped
from diffalign.rewards.catalog import Entry, find
from diffalign.rewards.frames import PerFrame
from diffalign.rewards.isolated import FAILURES, switches, users, why
from diffalign.rewards.remote import Remote


def load(name: str, deadline: float = 300.0, batch: int = 16, frames: str = "all", reduce: str = "mean") -> Reward:
    """The reward of a name; classes are created without arguments, or with the place of their weights.

    deadline, batch: of `Remote`; frames, reduce: of `PerFrame`, which shows videos to the rewards for pictures that come with the tool.

    Raises:
        UserError: if its module cannot be imported or lacks the function.
    """
    try:
        entry = find(name)
    except LookupError as error:
        raise UserError(f"rewards: {name}: {error}") from error
    if entry.urls:
        return Remote(name, entry.urls, deadline, batch)
    with content.opened() as seen, switches():
        reward = _loaded(entry)
    reward.background = reward.background or entry.background
    reward = PerFrame(reward, frames, reduce) if entry.modality == "image" else reward
    reward.foreign = not entry.source.startswith("reward_models.")
    reward.files = content.own_files(entry, seen)
    return reward


def _loaded(entry: Entry) -> Reward:
    """An entry's object, imported and created."""
    try:
        module = _module(entry)
    except FAILURES as error:
        raise UserError(f"rewards: {entry.name}: cannot be imported: {why(error)}") from error
    target = getattr(module, entry.attribute, None)
    if not callable(target):
        what = f"is {shown(target)}" if hasattr(module, entry.attribute) else "is not there"
        raise UserError(
            f"rewards: {entry.name}: {entry.attribute!r} in {entry.source} {what}, allowed is what can be called"
        )
    made = _made(entry, target) if inspect.isclass(target) else target
    return made if isinstance(made, Reward) else Wrapped(made, entry.background)


def _made(entry: Entry, kind: Any) -> Any:
    try:
        return kind() if entry.place is None else kind(entry.place)
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
    for other in [key for key in sys.modules if key.partition(".")[0] in _names(path.parent)]:
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
