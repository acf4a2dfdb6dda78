"""Encoded prompts: each batch once in memory, and with a store each text once on disk, under a budget.

With a store, texts are encoded one at a time and put together to batches. That this gives what the pipeline itself gives is found out on
two texts first; where it does not, batches are encoded whole and nothing is stored. Once all texts of a run are stored, the text
encoders are not needed any more.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.errors import Fault
from diffalign.models.encoding_store import Store

MEMORY_BYTES = 2**30  # of encoded batches kept in memory: one prompt of a large T5 takes 4 MB
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
    hashed = hashlib.sha256(json.dumps(more).encode())
    for module in encoders:
        for name, tensor in module.state_dict().items():
            hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            hashed.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    for tokenizer in tokenizers:
        vocabulary = sorted(tokenizer.get_vocab().items()) if hasattr(tokenizer, "get_vocab") else repr(tokenizer)
        hashed.update(json.dumps([vocabulary, str(getattr(tokenizer, "chat_template", None))]).encode())
    return hashed.hexdigest()


# Of a leaf of a single text's encoding: True: it has a row for each text; False: it is the same for all; a dtype: there is none, and a
# batch of texts of several lengths has a mask of that type over the leaf before it.
Layout = Sequence[bool | torch.dtype]


def joined(rows: Sequence[Any], layout: Layout) -> Any:
    """A batch from the encodings of single texts; rows are padded with zeros at the end where their lengths differ. Lists of one
    tensor a text are joined as lists."""
    order = iter(layout)
    lengths: list[int] = []
    where: list[torch.device] = []

    def join(*items: Any) -> Any:
        first = items[0]
        if isinstance(first, list):
            mine = [next(order) for _ in first]
            return [item for row in items for item in row] if all(mine) else first
        if isinstance(first, tuple):
            return tuple(join(*column) for column in zip(*items, strict=True))
        kind = next(order)
        if isinstance(kind, torch.dtype):
            if len(set(lengths)) == 1:
                return None
            places, ends = (torch.tensor(each, device=where[-1]) for each in (range(max(lengths)), lengths))
            return (places < ends[:, None]).to(kind)
        if not kind or first.ndim < 2:
            return torch.cat(items) if kind else first
        lengths[:] = [item.shape[1] for item in items]
        where.append(first.device)
        room = [(0, 0) * (item.ndim - 2) + (0, max(lengths) - item.shape[1]) for item in items]
        return torch.cat([F.pad(item, space) for item, space in zip(items, room, strict=True)])

    return join(*rows)


@dataclass(frozen=True)
class Kept:
    """Encodings of single texts on disk: where, what their names begin from, how batches are put together, and whether all that will be
    asked for are there."""

    store: Store
    depends: str
    layout: Layout
    complete: bool


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
        self._calls: list[dict[str, Any]] = []  # the arguments of the calls so far, for `prepare`
        self._complete = False  # everything that will be asked for is stored

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = dict(self._signature.bind(*args, **kwargs).arguments)
        if not self.splits:
            if self._store is not None:
                self._calls.append(
                    {k: list(v) if _texts(k, v) else v for k, v in arguments.items()}
                )  # some write into it
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
        if self._complete:
            raise Fault(f"the encoded prompt {arguments.get('prompt')!r} is gone from the cache; start again")
        with torch.no_grad():
            return mapped(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, self._encode(**arguments))

    def _kept(self, arguments: dict[str, Any]) -> Any:
        """One text's encoding, from disk where it is there."""
        assert self._store is not None
        name, device = _name(self._depends, arguments), arguments.get("device")
        encoding = self._store.read(name)
        if encoding is None:
            encoding = self._fresh(arguments)
            self._store.write(name, encoding)
        return mapped(
            lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) and device is not None else leaf, encoding
        )

    @classmethod
    def of(cls, encode: Callable[..., Any], kept: Kept) -> Encodings:
        """For a pipeline whose texts' encodings are kept."""
        made = cls(encode, kept.store, kept.depends)
        made._layout, made._complete = kept.layout, kept.complete
        return made

    def kept(self, complete: bool) -> Kept | None:
        """What is on disk, for other pipelines of the same call; None if batches are encoded whole."""
        assert self._store is not None
        return None if self._layout is None else Kept(self._store, self._depends, self._layout, complete)

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
        rows = [self._fresh(_with_texts(calls[0], [text])) for text in (short, long)]
        whole = self._fresh(_with_texts(calls[0], [short, long]))
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
            *(_with_texts(calls[0], [text]) for text in mine),
            *itertools.chain.from_iterable(map(_single, self._calls)),
        ]:
            self._kept(row)
        return ""


def _texts(name: str, value: Any) -> bool:
    return "prompt" in name and isinstance(value, list) and all(isinstance(item, str) for item in value)


def _with_texts(arguments: dict[str, Any], texts: list[str]) -> dict[str, Any]:
    """A call's arguments with other texts."""

    def replaced(name: str, value: Any) -> Any:
        if not _texts(name, value):
            return value
        return [value[0]] * len(texts) if name.startswith("negative") else texts

    return {name: replaced(name, value) for name, value in arguments.items()}


def _single(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """A call's arguments for each of its texts."""
    count = len(arguments["prompt"]) if _texts("prompt", arguments["prompt"]) else 1
    return [
        {name: [value[k]] if _texts(name, value) else value for name, value in arguments.items()} for k in range(count)
    ]


def _name(depends: str, arguments: dict[str, Any]) -> str:
    """Where an encoding depends on it, a call's arguments: all but the device."""
    asked = sorted((name, repr(value)) for name, value in arguments.items() if name != "device")
    return hashlib.sha256(json.dumps([depends, asked]).encode()).hexdigest()


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


def _close(joined_rows: Any, expected: Any) -> bool:
    """Whether two encodings are equal but for rounding."""

    def alike(a: Any, b: Any) -> bool:
        if not isinstance(a, Tensor):
            return bool(a == b)
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        size = b.double().abs().max().clamp(min=1e-12) if b.numel() else torch.tensor(1.0)
        return bool((a.double() - b.double()).abs().max() <= CLOSE * size) if b.numel() else True

    pairs = zip(leaves(joined_rows), leaves(expected), strict=False)
    return len(leaves(joined_rows)) == len(leaves(expected)) and all(itertools.starmap(alike, pairs))
