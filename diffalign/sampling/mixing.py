"""Adapters in predictions: an adapter on the one that guidance leads away from, and adapters mixed by what they predict."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from diffalign.backends.guiding import rows_of
from diffalign.errors import Fault, UserError
from diffalign.models import lora
from diffalign.sampling import adapters
from diffalign.sampling.sources import Source

Forward = Callable[..., Any]
Draw = Callable[[Sequence[str], Sequence[int]], Any]
OTHERS = ("a", "b")  # captions: one of them is not the one that is tried


def mixed(pipe: Any, source: Source, draw: Draw) -> Draw:
    """`draw` of a source's pipeline, which has its adapters, with predictions as the source mixes them."""
    names = adapters.names(len(source.adapters) + (source.negative is not None))
    own, away = names[: len(source.adapters)], names[len(source.adapters) :]
    strengths: dict[str, float] = {}
    if source.mix == "predictions":
        strengths = {name: adapter.strength for name, adapter in zip(own, source.adapters, strict=True)}
        pipe.set_adapters(
            names, [*(1.0 for _ in own), *(() if source.negative is None else (source.negative.strength,))]
        )
    if not (strengths or away):
        return draw
    return Mixed(pipe, own, away or None, strengths).drawing(draw)


class _Seen(Exception):
    """One step's predictions are known."""


class Mixed:
    """A pipeline that predicts with more than one set of adapters.

    Without guidance's other prediction and with `strengths` empty it is the pipeline as it is.

    Args:
        pipe: with all adapters loaded.
        names: the adapters that act together on what is drawn.
        negative: those that act on what guidance leads away from; None: `names`.
        strengths: by adapter, where predictions are mixed: p = p_0 + sum_i s_i (p_i - p_0), p_0 without any; empty: `names` act at once.
    """

    def __init__(
        self, pipe: Any, names: Sequence[str], negative: Sequence[str] | None, strengths: dict[str, float]
    ) -> None:
        self.pipe, self.names, self.negative, self.strengths = pipe, list(names), negative, strengths
        self.layers = lora.layers(pipe)
        self.pattern: list[list[bool]] = []  # of a step's calls: which blocks of rows guidance leads away from
        self.prompts, self.number = 1, 0  # of the present call of the pipeline: captions; of the step: calls so far

    @contextmanager
    def acting(self) -> Iterator[None]:
        """The networks predict so for the length of the context."""
        modules = list(lora.denoisers(self.pipe).values())
        own = [module.forward for module in modules]
        step = self.pipe.scheduler.step

        def stepped(*args: Any, **kwargs: Any) -> Any:
            self.number = 0
            return step(*args, **kwargs)

        for module in modules:
            module.forward = self._forward(module.forward)
        self.pipe.scheduler.step = stepped
        try:
            yield
        finally:
            self.pipe.scheduler.step = step
            for module, forward in zip(modules, own, strict=True):
                module.forward = forward

    def drawing(self, draw: Draw) -> Draw:
        """`draw` with predictions as they are mixed."""

        def drawn(prompts: Sequence[str], seeds: Sequence[int]) -> Any:
            if self.negative is not None and not self.pattern:
                self.pattern = self._looked(draw, prompts[0], seeds[0])
            self.prompts, self.number = len(seeds), 0
            with self.acting():
                return draw(prompts, seeds)

        return drawn

    # -- which predictions guidance leads away from

    def _looked(self, draw: Draw, prompt: str, seed: int) -> list[list[bool]]:
        """Rows that stay as they are where the caption is another one, of each call of a step.

        Raises:
            UserError: if there are none.
        """
        one, other = (self._step(draw, text, seed) for text in (prompt, OTHERS[prompt == OTHERS[0]]))
        found = [
            [all(torch.equal(x, y) for x, y in zip(a, b, strict=True)) for a, b in zip(mine, theirs, strict=True)]
            for mine, theirs in zip(one, other, strict=True)
        ]
        if not any(map(any, found)):
            raise UserError(
                f"--negative-adapter: no effect, {type(self.pipe).__name__} predicts once a step as it is called; allowed with --guidance "
                "above 1 where that makes it predict twice, or --set true_cfg_scale=2 with --negative"
            )
        return found

    def _step(self, draw: Draw, prompt: str, seed: int) -> list[list[list[Tensor]]]:
        """The first step's calls, of each the rows, of each its inputs."""
        calls: list[list[list[Tensor]]] = []

        def before(module: Any, args: Any, kwargs: Any) -> None:
            rows = rows_of(args, kwargs)
            calls.append(
                [
                    [x.clone() for x in tree_leaves(_part((args, kwargs), rows, [k])) if isinstance(x, Tensor)]
                    for k in range(rows)
                ]
            )

        def ends(*args: Any, **kwargs: Any) -> None:
            raise _Seen

        hooks = [
            module.register_forward_pre_hook(before, with_kwargs=True) for module in lora.denoisers(self.pipe).values()
        ]
        step, self.pipe.scheduler.step = self.pipe.scheduler.step, ends
        try:
            draw([prompt], [seed])
        except Exception as error:
            if not isinstance(error.__cause__ or error, _Seen):
                raise
        finally:
            self.pipe.scheduler.step = step
            for hook in hooks:
                hook.remove()
        return calls

    # -- predictions

    def _forward(self, forward: Forward) -> Forward:
        def predicted(*args: Any, **kwargs: Any) -> Any:
            if self.negative is None:
                return self._mixed(forward, args, kwargs)
            rows = rows_of(args, kwargs)
            blocks = self._blocks(rows // self.prompts)
            outs: dict[int, Any] = {}
            for away in sorted(set(blocks)):
                chosen = [row for row in range(rows) if blocks[row // self.prompts] == away]
                part = (args, kwargs) if len(chosen) == rows else _part((args, kwargs), rows, chosen)
                with lora.acting(self.layers, self.negative) if away else lora.acting(self.layers, self.names):
                    out = forward(*part[0], **part[1]) if away else self._mixed(forward, *part)
                if len(chosen) == rows:
                    return out
                outs |= {row: (out, k) for k, row in enumerate(chosen)}
            return _joined([outs[row] for row in range(rows)])

        return predicted

    def _blocks(self, count: int) -> list[bool]:
        """Of the present call."""
        known = self.pattern[self.number] if self.number < len(self.pattern) else None
        self.number += 1
        if count == 1 and (known is None or len(known) != 1):
            return [False]  # a step without guidance
        if known is None or len(known) != count:
            raise Fault(f"--negative-adapter: {type(self.pipe).__name__} predicts otherwise than at its first step")
        return known

    def _mixed(self, forward: Forward, args: Any, kwargs: Any) -> Any:
        """p_0 + sum_i s_i (p_i - p_0)"""
        if not self.strengths:
            return forward(*args, **kwargs)
        with lora.acting(self.layers, ()):
            base = forward(*args, **kwargs)
        total = base
        for name, strength in self.strengths.items():
            with lora.acting(self.layers, [name]):
                out = forward(*args, **kwargs)
            total = tree_map(functools.partial(_moved, strength), total, out, base)
        return total


def _moved(strength: float, total: Any, one: Any, none: Any) -> Any:
    return total + strength * (one - none) if isinstance(total, Tensor) else total


def _part(value: Any, rows: int, chosen: Sequence[int]) -> Any:
    """Some rows of a network's arguments: of tensors whose first dimension they are, of lists of one tensor a row."""
    if isinstance(value, Tensor):
        return value[list(chosen)] if value.ndim and len(value) == rows else value
    if isinstance(value, list) and len(value) == rows and all(isinstance(x, Tensor) for x in value):
        return [value[row] for row in chosen]
    if isinstance(value, dict):
        return {key: _part(inner, rows, chosen) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_part(inner, rows, chosen) for inner in value)
    return value


def _joined(rows: list[tuple[Any, int]]) -> Any:
    """An output of which each row is one of another output: (output, row)."""
    first = rows[0][0]
    if isinstance(first, Tensor):
        return torch.stack([out[k] for out, k in rows])
    if isinstance(first, list) and isinstance(first[0], Tensor):
        return [out[k] for out, k in rows]
    if isinstance(first, tuple):
        return tuple(_joined([(out[j], k) for out, k in rows]) for j in range(len(first)))
    raise Fault(f"--negative-adapter: a network gives a {type(first).__name__}, which cannot be put together")
