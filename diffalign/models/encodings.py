"""Encoded prompts: each batch once in memory, and with a store each text once on disk, under a budget.

With a store, texts are encoded one at a time and put together to batches. That this gives what the pipeline itself gives is found out on
two texts first; where it does not, batches are encoded whole and nothing is stored. Once all texts of a run are stored, the text
encoders are not needed any more.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import itertools
import json
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from diffalign.errors import Fault, one_line
from diffalign.runtime.files import make_folder

MEMORY_BYTES = 2**30  # of encoded batches kept in memory: one prompt of a large T5 takes 4 MB
OWN = re.compile(r"[0-9a-f]{64}")  # names of its files
CLOSE = 2e-2  # largest difference between a batch's and single texts' encodings, as a share of the encoding's own size (bfloat16)


def leaves(value: Any) -> list[Any]:
    """What nested tuples and lists hold, in order."""
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, (tuple, list)) else [value]


def mapped(function: Callable[..., Any], *trees: Any) -> Any:
    """The tree of a function's values at the leaves of trees of one form."""
    first = trees[0]
    if isinstance(first, (tuple, list)):
        return type(first)(mapped(function, *items) for items in zip(*trees, strict=True))
    return function(*trees)


def stored_bytes(value: Any) -> int:
    """Bytes of the tensors in nested tuples and lists."""
    return sum(leaf.nbytes for leaf in leaves(value) if isinstance(leaf, Tensor))


def digest(encoders: Iterable[torch.nn.Module], tokenizers: Iterable[Any], *more: str) -> str:
    """A name for what encodings depend on besides the call: weights and their precision, vocabularies, versions."""
    found = hashlib.sha256(json.dumps(more).encode())
    for module in encoders:
        for name, tensor in module.state_dict().items():
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    for tokenizer in tokenizers:
        vocabulary = sorted(tokenizer.get_vocab().items()) if hasattr(tokenizer, "get_vocab") else repr(tokenizer)
        found.update(json.dumps([vocabulary, str(getattr(tokenizer, "chat_template", None))]).encode())
    return found.hexdigest()


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
            self.used += part.stat().st_size
            os.replace(part, path)
        except (OSError, SafetensorError) as error:
            part.unlink(missing_ok=True)
            raise Fault(f"prompts.cache: cannot write {path}: {one_line(error)}") from error
        if self.used > self.budget:
            self._shrink()

    def _shrink(self) -> None:
        """Remove what was used longest ago, down to nine tenths of the budget."""
        found = []
        for path in self._own():
            try:
                facts = path.stat()
            except FileNotFoundError:  # another process removed it
                continue
            found.append((facts.st_mtime_ns, facts.st_size, path))
        self.used = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
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


# Of a leaf of a single text's encoding: True: it has a row for each text; False: it is the same for all; a dtype: there is none, and a
# batch of texts of several lengths has a mask of that type over the leaf before it.
Layout = Sequence[bool | torch.dtype]


def joined(rows: Sequence[Any], layout: Layout) -> Any:
    """A batch from the encodings of single texts; rows are padded with zeros at the end where their lengths differ. Lists of one
    tensor a text are joined as lists."""
    order = iter(layout)
    lengths: list[int] = []

    def join(*items: Any) -> Any:
        first = items[0]
        if isinstance(first, list):
            mine = [next(order) for _ in first]
            return [item for row in items for item in row] if all(mine) else first
        if isinstance(first, tuple):
            return tuple(join(*column) for column in zip(*items, strict=True))
        kind = next(order)
        if isinstance(kind, torch.dtype):
            places = torch.arange(max(lengths))
            return None if len(set(lengths)) == 1 else (places < torch.tensor(lengths)[:, None]).to(kind)
        if not kind or first.ndim < 2:
            return torch.cat(items) if kind else first
        lengths[:] = [item.shape[1] for item in items]
        room = [(0, 0) * (item.ndim - 2) + (0, max(lengths) - item.shape[1]) for item in items]
        return torch.cat([F.pad(item, space) for item, space in zip(items, room, strict=True)])

    return join(*rows)


class Encodings:
    """A pipeline's `encode_prompt` that remembers.

    Args:
        encode: the pipeline's own.
        store: where encodings of single texts are kept; None: batches in memory only.
        depends: what names in the store begin from, see `digest`.
    """

    def __init__(self, encode: Callable[..., Any], store: Store | None = None, depends: str = "") -> None:
        self._encode, self._store, self._depends = encode, store, depends
        self._signature = inspect.signature(encode)
        self._memory: OrderedDict[str, Any] = OrderedDict()
        self._layout: Layout | None = None  # of single texts' encodings; None: batches are encoded whole
        self._calls: list[dict[str, Any]] = []  # the arguments of the calls so far
        self.complete = False  # everything that will be asked for is stored

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = dict(self._signature.bind(*args, **kwargs).arguments)
        if not self.splits:
            self._calls.append({k: list(v) if _texts(k, v) else v for k, v in arguments.items()})  # some write into it
            return self._remembered(arguments, self._fresh)
        rows = [self._remembered(row, self._kept) for row in _single(arguments)]
        return joined(rows, self._layout or []) if len(rows) > 1 else rows[0]

    def _remembered(self, arguments: dict[str, Any], get: Callable[[dict[str, Any]], Any]) -> Any:
        name = _name(self._depends, arguments)
        if name not in self._memory:
            self._memory[name] = get(arguments)
            while len(self._memory) > 1 and stored_bytes(list(self._memory.values())) > MEMORY_BYTES:
                self._memory.popitem(last=False)
        self._memory.move_to_end(name)
        return self._memory[name]

    def _fresh(self, arguments: dict[str, Any]) -> Any:
        if self.complete:
            raise Fault(f"the encoded prompt {arguments.get('prompt')!r} is gone from the cache; start again")
        with torch.no_grad():
            return mapped(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, self._encode(**arguments))

    def _kept(self, arguments: dict[str, Any]) -> Any:
        """One text's encoding, from disk where it is there."""
        assert self._store is not None
        name, device = _name(self._depends, arguments), arguments.get("device")
        found = self._store.read(name)
        if found is None:
            found = self._fresh(arguments)
            self._store.write(name, found)
        return mapped(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) and device is not None else leaf, found)

    @property
    def splits(self) -> bool:
        """Whether batches are put together from single texts."""
        return self._layout is not None

    def prepare(self, texts: Sequence[str], mine: Sequence[str]) -> str:
        """Store the encodings of `mine` among all texts of a run; returns why not, "" if it is done.

        Call it after the pipeline ran once, with texts[0]: what else it passes to its `encode_prompt` is taken from there.
        """
        assert self._store is not None
        calls = [call for call in self._calls if call["prompt"] in (texts[0], [texts[0]])]
        if len(calls) != 1:
            return f"the pipeline encodes a prompt in {len(calls)} calls"
        short, long = min(texts, key=len), max(texts, key=len)
        rows = [self._fresh(_told(calls[0], [text])) for text in (short, long)]
        whole = self._fresh(_told(calls[0], [short, long]))
        layout = _layout(rows[1], whole)
        if layout is None or not _close(joined(rows, layout), whole):
            return "the pipeline encodes a batch otherwise than its texts one by one"
        self._layout = layout
        self._memory.clear()
        needed = stored_bytes(rows[1]) * len(texts)
        if needed > 0.9 * self._store.budget:
            allowed = self._store.budget / 2**30
            return f"{len(texts)} encoded prompts take up to {needed / 2**30:.3g} GiB, prompts.cache_gib allows {allowed:g}"
        for row in [
            *(_told(calls[0], [text]) for text in mine),
            *itertools.chain.from_iterable(map(_single, self._calls)),
        ]:
            self._kept(row)
        return ""


def _texts(name: str, value: Any) -> bool:
    return "prompt" in name and isinstance(value, list) and all(isinstance(item, str) for item in value)


def _told(arguments: dict[str, Any], texts: list[str]) -> dict[str, Any]:
    """A call's arguments with other texts."""

    def told(name: str, value: Any) -> Any:
        if not _texts(name, value):
            return value
        return [value[0]] * len(texts) if name.startswith("negative") else texts

    return {name: told(name, value) for name, value in arguments.items()}


def _single(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """A call's arguments for each of its texts."""
    count = len(arguments["prompt"]) if _texts("prompt", arguments["prompt"]) else 1
    return [
        {name: [value[k]] if _texts(name, value) else value for name, value in arguments.items()} for k in range(count)
    ]


def _name(depends: str, arguments: dict[str, Any]) -> str:
    """Where an encoding depends on it, a call's arguments: all but the device."""
    told = sorted((name, repr(value)) for name, value in arguments.items() if name != "device")
    return hashlib.sha256(json.dumps([depends, told]).encode()).hexdigest()


def _layout(one: Any, two: Any) -> Layout | None:
    """How the encoding of two texts is made of single ones; None if they do not correspond."""
    if isinstance(one, list):
        return [True] * len(one) if len(two) == 2 * len(one) else [False] * len(one) if len(one) == len(two) else None
    if isinstance(one, tuple):
        parts = [_layout(a, b) for a, b in zip(one, two, strict=True)] if len(one) == len(two) else [None]
        return None if None in parts else list(itertools.chain.from_iterable(part or [] for part in parts))
    if one is None and isinstance(two, Tensor) and two.ndim == 2:
        return [two.dtype]
    if not isinstance(one, Tensor):
        return [False]
    if not isinstance(two, Tensor) or one.ndim != two.ndim:
        return None
    if one.shape == two.shape:
        return [False]
    return [True] if one.ndim and two.shape[0] == 2 * one.shape[0] else None


def _close(found: Any, expected: Any) -> bool:
    """Whether two encodings are equal but for rounding."""

    def alike(a: Any, b: Any) -> bool:
        if not isinstance(a, Tensor):
            return bool(a == b)
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        size = b.double().abs().max().clamp(min=1e-12) if b.numel() else torch.tensor(1.0)
        return bool((a.double() - b.double()).abs().max() <= CLOSE * size) if b.numel() else True

    pairs = zip(leaves(found), leaves(expected), strict=False)
    return len(leaves(found)) == len(leaves(expected)) and all(itertools.starmap(alike, pairs))


@functools.cache
def versions() -> str:
    """Of the libraries that tokenize and encode."""
    from importlib.metadata import version

    return ", ".join(f"{name} {version(name)}" for name in ("diffusers", "transformers", "tokenizers"))
