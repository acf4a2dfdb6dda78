"""Encoded prompts on disk, one file each, under a budget."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffalign.errors import Fault, one_line
from diffalign.runtime.files import make_folder, share

OWN = re.compile(r"[0-9a-f]{64}")  # names of its files


class Store:
    """Encodings on disk, one file each; the least recently used go when they take more than `budget` bytes.

    Several processes may use one folder: files appear whole, and one that is gone or damaged counts as not there. Other files in the
    folder are neither counted nor touched.
    """

    def __init__(self, folder: Path, budget: float) -> None:
        self.folder, self.budget = folder, budget
        make_folder(folder, "prompts.cache")
        self.used = sum(path.stat().st_size for path in self._own())

    def _own(self) -> list[Path]:
        """The store's files, which are named by a digest."""
        return [path for path in self.folder.glob("*.safetensors") if OWN.fullmatch(path.stem)]

    def read(self, name: str) -> Any:
        """The encoding of a name, None if it is not there."""
        path = self.folder / f"{name}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                tree = json.loads(file.metadata()["tree"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
            os.utime(path)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None
        return _planted(tree, tensors)

    def write(self, name: str, value: Any) -> None:
        """Keep an encoding, and let old ones go."""
        tensors: dict[str, Tensor] = {}
        tree = _uprooted(value, tensors)
        path = self.folder / f"{name}.safetensors"
        part = path.with_suffix(f".{os.getpid()}")
        try:
            save_file(tensors, part, metadata={"tree": json.dumps(tree)})
            share(part)
            self.used += part.stat().st_size
            os.replace(part, path)
        except (OSError, SafetensorError) as error:
            part.unlink(missing_ok=True)
            raise Fault(f"prompts.cache: cannot write {path}: {one_line(error)}") from error
        if self.used > self.budget:
            self._shrink()

    def _shrink(self) -> None:
        """Remove what was used longest ago, down to nine tenths of the budget."""
        files = []
        for path in self._own():
            try:
                facts = path.stat()
            except FileNotFoundError:  # another process removed it
                continue
            files.append((facts.st_mtime_ns, facts.st_size, path))
        self.used = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if self.used <= 0.9 * self.budget:
                break
            path.unlink(missing_ok=True)
            self.used -= size


def _uprooted(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A tree as JSON, its tensors by number in `tensors`."""
    if isinstance(value, Tensor):
        tensors[str(len(tensors))] = value.detach().cpu().contiguous().clone()  # clones: files share no memory
        return {"tensor": len(tensors) - 1}
    if isinstance(value, (tuple, list)):
        return {type(value).__name__: [_uprooted(item, tensors) for item in value]}
    return {"value": value}


def _planted(tree: Any, tensors: dict[str, Tensor]) -> Any:
    ((kind, inside),) = tree.items()
    if kind == "tensor":
        return tensors[str(inside)]
    if kind == "value":
        return inside
    return {"tuple": tuple, "list": list}[kind](_planted(item, tensors) for item in inside)
