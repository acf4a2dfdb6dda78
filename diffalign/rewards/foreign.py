"""Reward functions that were written for other trainers, as they stand: called by keyword, in the form of pictures they take."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign.errors import Fault
from diffalign.rewards.answers import read
from diffalign.rewards.base import Reward, Wrapped, to_uint8
from diffalign.rewards.forms import handed, pil
from diffalign.rewards.takes import MADE, Takes, Unrecognised, is_factory, of_signature, recognised, signature_of
from diffalign.types import Floats, Media, Prompts

Target = Callable[..., Any]


def adapted(name: str, target: Any, told: Any, part: str, device: torch.device) -> Reward:
    """What a user's file has under `name` as a reward.

    told: the module's `TAKES`; part: of its answer; device: handed to what makes a reward, and where its tensors are.

    Raises:
        Unrecognised: if how it is called cannot be told, or it cannot be a reward.
    """
    if inspect.isclass(target) and _of_flow_factory(target):
        return FlowFactory(name, target, part, device)
    if inspect.isclass(target) or (not isinstance(target, Reward) and _makes(target)):
        target = _made(name, target, device)
    if isinstance(target, Reward):
        return target
    if getattr(target, "as_loss", False) is True:
        raise Unrecognised(f"{name} was made with as_loss, a mean; allowed is one number a picture: as_loss=False")
    parameters = of_signature(signature_of(target))
    takes = recognised(name, parameters, told)
    if takes.form == "media" and not part and [p.name for p in parameters[:2]] == [takes.pictures, takes.prompts]:
        own = Wrapped(target)
        own.recognised = str(takes)
        return own
    return Foreign(target, takes, part, device)


def _makes(target: Target) -> bool:
    return is_factory(of_signature(signature_of(target))) and not _is_bare(target)


def _is_bare(target: Target) -> bool:
    """Whether it says no more than `*args` or `**kwargs`."""
    kinds = {parameter.kind for parameter in signature_of(target).parameters.values()}
    return inspect.Parameter.VAR_POSITIONAL in kinds or kinds == {inspect.Parameter.VAR_KEYWORD}


def _made(name: str, target: Target, device: torch.device) -> Any:
    """What a class or a factory makes."""
    try:
        parameters = of_signature(inspect.signature(target))
    except (TypeError, ValueError):  # a class in C
        parameters = []
    if lacking := [p.name for p in parameters if p.required and p.name not in MADE]:
        raise Unrecognised(
            f"{name} is made from {', '.join(lacking)}; allowed here are device and dtype: make it in the file, x = {name}(...), and name x"
        )
    handed = {"device": device, "dtype": torch.float32}
    made = target(**{p.name: handed[p.name] for p in parameters if p.name in handed})
    if inspect.isclass(target) and not callable(made):
        methods = [key for key in dir(made) if not key.startswith("_") and callable(getattr(made, key))]
        raise Unrecognised(
            f"a {name} cannot be called; allowed is one of its methods: x = {name}() and x.{'|'.join(methods)}"
        )
    if not callable(made):
        raise Unrecognised(
            f"{name}({', '.join(p.name for p in parameters)}) made {type(made).__name__}, allowed is a function of pictures"
        )
    if not inspect.isclass(target) and not isinstance(made, Reward) and (inspect.isclass(made) or _makes(made)):
        raise Unrecognised(f"{name} makes what makes something; allowed is a function of pictures, or what makes one")
    return made


class Foreign(Wrapped):
    """A reward in another form than ours."""

    def __init__(self, function: Target, takes: Takes, part: str, device: torch.device) -> None:
        super().__init__(function)
        self.takes, self.part, self.device = takes, part, device
        self.sign = -1 if getattr(function, "lower_better", False) is True else 1
        more = [f"part {part!r} of the answer"] if part else []
        self.recognised = "; ".join([str(takes), *more, *(["lower is better"] if self.sign < 0 else [])])
        self.probed, self.clips = True, takes.clips
        self.keeps_gradient = takes.form in ("float", "media")

    def __call__(self, media: Media, prompts: Prompts) -> Any:
        count = len(prompts)
        if self.takes.form == "media":
            values = read(_finished([self._called(media, prompts, prompts.metadata)])[0], count, self.part)
        else:
            with handed(media, self.takes, self._place()) as shown:
                if self.takes.one:
                    values = self._each(shown, prompts)
                else:
                    answer = self._called(shown, list(prompts.text), list(prompts.metadata))
                    values = read(_finished([answer])[0], count, self.part)
        return values if self.sign > 0 else -1.0 * values

    def _called(self, pictures: Any, prompts: Any, metadata: Any) -> Any:
        """Its answer to a call by keyword."""
        given = {self.takes.pictures: pictures, self.takes.prompts: prompts, self.takes.metadata: metadata}
        return self.function(**{key: value for key, value in given.items() if key})

    def _each(self, shown: Sequence[Any], prompts: Prompts) -> Any:
        """One call a sample; those that wait do so together."""
        rows = zip(shown, prompts.text, prompts.metadata, strict=True)
        answers = [self._called([one] if self.takes.listed else one, text, about) for one, text, about in rows]
        values = [read(answer, 1, self.part) for answer in _finished(answers)]
        if values and all(isinstance(value, Tensor) for value in values):
            return torch.cat(values)
        return np.concatenate(
            [np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value) for value in values]
        )

    def _place(self) -> torch.device:
        """Where its tensors are to be: with its network, if it is one."""
        if isinstance(self.function, torch.nn.Module):
            return next((tensor.device for tensor in self.function.parameters()), self.device)
        return self.device


def _finished(answers: list[Any]) -> list[Any]:
    """The same, those of `async def` run to their end, at one time."""
    if not any(inspect.isawaitable(answer) for answer in answers):
        return answers

    async def all_of() -> list[Any]:
        return list(await asyncio.gather(*answers))

    def run(work: Coroutine[Any, Any, list[Any]]) -> list[Any]:
        return asyncio.run(work)

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return run(all_of())
    with ThreadPoolExecutor(1) as pool:  # in a notebook, whose own loop is running
        return pool.submit(run, all_of()).result()


def _of_flow_factory(kind: type) -> bool:
    """Whether a class is a reward model of Flow-Factory, or written as one."""
    named = hasattr(kind, "required_fields") or any(base.__name__.endswith("RewardModel") for base in kind.__mro__[1:])
    try:
        return named and {"config", "accelerator"} <= inspect.signature(kind).parameters.keys()
    except (TypeError, ValueError):
        return False


class FlowFactory(Wrapped):
    """A reward model of Flow-Factory's kind: lists by the names of a sample's fields; `Groupwise...` gets a whole group a call.

    sizes: how many samples a whole group may have; empty where samples come one by one.
    """

    def __init__(self, name: str, kind: type, part: str, device: torch.device) -> None:
        config = SimpleNamespace(name=name, reward_model=name, device=device, dtype=torch.float32, weight=1.0)
        config.batch_size, config.extra_kwargs = 16, {}
        accelerator = SimpleNamespace(device=device, process_index=0, local_process_index=0, num_processes=1)
        accelerator.is_main_process = accelerator.is_local_main_process = True
        accelerator.wait_for_everyone = lambda: None
        made: Target = kind(config=config, accelerator=accelerator)
        super().__init__(made)
        self.device, self.part = device, part
        self.fields = tuple(getattr(made, "required_fields", ()))
        self.names = [p.name for p in of_signature(inspect.signature(made))]
        self.grouped = any("Groupwise" in base.__name__ for base in kind.__mro__)
        self.clips = "video" in self.names or self.grouped
        self.tensors = bool(getattr(made, "use_tensor_inputs", False))
        what = "a call for each group" if self.grouped else "all samples at once"
        self.recognised = f"a class of Flow-Factory's kind: {', '.join(self.fields) or 'no'} fields, {what}"
        self.probed = not self.grouped

    def __call__(self, media: Media, prompts: Prompts) -> Any:
        if not self.grouped:
            return self._scored(media, prompts)
        scores: Floats = np.full(len(prompts), np.nan)
        for rows in self.groups(prompts):
            values = self._scored(Media(media.pixels[torch.from_numpy(rows)], media.fps), prompts.select(rows))
            scores[rows] = values.detach().cpu() if isinstance(values, Tensor) else values
        return scores

    def _scored(self, media: Media, prompts: Prompts) -> Any:
        kind = "video" if media.pixels.shape[1] > 1 else "image"
        if kind not in self.names:
            raise Fault(f"takes {', '.join(self.names)}, allowed is a reward for {kind}s")
        given: dict[str, Any] = {kind: self._shown(media), "prompt": list(prompts.text)}
        about = set.intersection(*(set(each) for each in prompts.metadata))
        if lacking := [f for f in self.fields if f not in {*about, "prompt", "image", "video"}]:
            raise Fault(
                f"its required_fields name {', '.join(map(repr, lacking))}, allowed are image, video, and what every "
                f"prompt has: {', '.join(sorted(about))}"
            )
        for key in (about - given.keys()) & {*self.names, *self.fields}:
            given[key] = [each[key] for each in prompts.metadata]
        wanted = {key: value for key, value in given.items() if key in self.names or key in self.fields}
        return read(_finished([self.function(**wanted)])[0], len(prompts), self.part)

    def _shown(self, media: Media) -> list[Any]:
        """Pictures or clips as they are taken."""
        still = media.pixels.shape[1] == 1
        if self.tensors:
            pixels = media.pixels.to(self.device)
            return list(pixels[:, 0] if still else pixels)
        frames = to_uint8(media)
        return pil(frames[:, 0] if still else frames)
