"""The one place that asks rewards: with or without gradient, in the background or here, by name and added up."""

from __future__ import annotations

import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffalign.errors import Fault, RewardFailed
from diffalign.protocols import RewardFunction
from diffalign.rewards.base import Column, Judge, Reward, as_reward, check_media, numbers
from diffalign.rewards.isolated import FAILURES, PAUSES, own, passing, staying, undisturbed, why
from diffalign.runtime import keys
from diffalign.runtime.memory import out_of_memory
from diffalign.types import Floats, Media, Prompts, Scores

LARGEST = float(np.finfo(np.float32).max)
Known = dict[Judge, Tensor]  # what judges answered to the samples at hand
Callables = Mapping[str, "Reward | Callable[[Media, Prompts], Any]"]


@dataclass
class Tally:
    """How many samples were asked for, how many have no score, how many of each reward, and each reward's scores."""

    asked: int = 0
    unscored: int = 0
    missing: Counter[str] = field(default_factory=Counter)
    values: dict[str, list[float]] = field(default_factory=dict)

    def note(self, name: str, values: list[float]) -> None:
        """Count a reward's scores."""
        self.missing[name] += sum(not math.isfinite(value) for value in values)
        self.values.setdefault(name, []).extend(values)

    def joined(self, other: Tally) -> Tally:
        """This one and another."""
        names = {**self.values, **other.values}
        values = {name: self.values.get(name, []) + other.values.get(name, []) for name in names}
        return Tally(self.asked + other.asked, self.unscored + other.unscored, self.missing + other.missing, values)


class Scorer:
    """Rewards by name, with their weights in the total.

    Args:
        rewards: rewards, or functions that are wrapped as such.
        weights: of each; 1 where left out.
        offload: whether networks of rewards are on the device one at a time, and none of them once all is scored.
    """

    def __init__(self, rewards: Callables, weights: Mapping[str, float] | None = None, offload: bool = False) -> None:
        self.rewards: dict[str, Reward] = {name: as_reward(reward) for name, reward in rewards.items()}
        self.weights = dict.fromkeys(self.rewards, 1.0) if weights is None else dict(weights)
        self._offload = offload
        self._there: Reward | None = None  # whose network is on the device
        self._threads: dict[str, ThreadPoolExecutor] = {}
        self._proved: set[str] = set()  # those that were found to depend on the pixels

    def only(self, names: Sequence[str] | None) -> Scorer:
        """The same rewards, or some of them, with the weights that they have now; None: all."""
        chosen = list(self.rewards) if names is None else names
        made = Scorer({n: self.rewards[n] for n in chosen}, {n: self.weights[n] for n in chosen}, self._offload)
        made._threads = self._threads
        return made

    def greet(self, say: Callable[[str], None] = print) -> None:
        """Let rewards behind servers find out whether they will answer; see `Reward.greet`."""
        for reward in self.rewards.values():
            reward.greet(say)

    def rest(self) -> None:
        """All is scored: networks leave the device until they are asked again, if they are to."""
        if self._offload:
            for reward in self.rewards.values():
                reward.rest()
            self._there = None

    def _alone(self, reward: Reward) -> None:
        """Let the network that was asked last leave for another one."""
        if self._offload and reward.networks() and self._there is not reward:
            if self._there is not None and _asks(self._there) is not _asks(reward):
                self._there.rest()
            self._there = reward

    # -- without gradient

    def begin(self, media: Media, prompts: Prompts) -> Callable[[], Scores]:
        """Begin to score media with every reward; the answer waits for those in the background and adds up by weight.

        A score that is not finite makes its sample invalid.

        Raises:
            Fault: (the answer too) if a reward returns the wrong number of scores, or fails.
        """
        check_media(media)
        aside = any(reward.background for reward in self.rewards.values())
        copy = Media(media.pixels.detach().cpu(), media.fps) if aside else media
        answers: dict[str, Callable[[], Floats]] = {}
        known: Known = {}
        for name, reward in self.rewards.items():
            if reward.background:
                work = functools.partial(_scored, name, reward, copy, prompts, {})
                answers[name] = self._thread(name).submit(work).result
            else:
                self._alone(reward)
                values = _scored(name, reward, media, prompts, known)
                answers[name] = functools.partial(lambda values: values, values)

        def finish() -> Scores:
            by_name = {name: answer() for name, answer in answers.items()}
            total = sum((self.weights[name] * values for name, values in by_name.items()), np.zeros(len(prompts)))
            valid = np.isfinite(total)
            return Scores(by_name, np.where(valid, total, 0.0), valid, self.weights)

        return finish

    def scores(self, media: Media, prompts: Prompts) -> Scores:
        """Score media with every reward and wait for all; see `begin`."""
        return self.begin(media, prompts)()

    def _thread(self, name: str) -> ThreadPoolExecutor:
        """One thread for each reward in the background."""
        return self._threads.setdefault(name, ThreadPoolExecutor(1, thread_name_prefix=f"reward {name}"))

    def unscored(self, by_name: Mapping[str, Floats]) -> str:
        """Which rewards have samples without a finite score, how many, and what is known of why; empty if none."""
        lines = []
        for name, values in by_name.items():
            if missing := int((~np.isfinite(values)).sum()):
                why = self.rewards[name].said if name in self.rewards else ""
                lines.append(f"{name}: {missing} of {len(values)}" + (f" ({why})" if why else ""))
        return ", ".join(lines)

    # -- with gradient

    def pathwise(self, prompts: Prompts, seen: dict[str, Tensor], tally: Tally | None = None) -> RewardFunction:
        """The weighted sum of rewards (N,) of media of these prompts, with its gradient: 0, and none, where there is no score, or NaN
        where no gradient is asked for.

        seen: gets means by their key in the log, for rules that sample no further than a replay; tally: counts what has no score.
        """

        def reward(media: Media) -> Tensor:
            valid = torch.ones(len(prompts), dtype=torch.bool, device=media.pixels.device)
            shown = Media(_guarded(check_media(media).pixels, valid), media.fps)
            total = media.pixels.new_zeros(len(prompts))
            known: Known = {}
            for name, function in self.rewards.items():
                value = _asked(name, function, shown, prompts, known)
                needed = torch.is_grad_enabled() and self.weights[name]  # of one that weighs 0 nothing is left
                if needed and not self._reaches(name, value, shown):
                    raise Fault(f"reward {name}: has no gradient to the pictures")
                if tuple(torch.as_tensor(value).shape) != (len(prompts),):
                    shape = tuple(torch.as_tensor(value).shape)
                    raise Fault(
                        f"reward {name}: returned shape {shape}, expected one number a sample: ({len(prompts)},)"
                    )
                value = torch.as_tensor(value, dtype=total.dtype, device=total.device)
                total = total + self.weights[name] * value
                _note(seen, keys.reward(name), value)
                if tally is not None:
                    tally.note(name, value.detach().tolist())
            valid &= total.detach().isfinite()
            _note(seen, keys.TOTAL, total)
            if tally is not None:
                tally.asked, tally.unscored = tally.asked + len(valid), tally.unscored + int((~valid).sum())
            return torch.where(valid, total, 0.0) if torch.is_grad_enabled() else total

        return reward

    def _reaches(self, name: str, value: Tensor | Sequence[float], media: Media) -> bool:
        """Whether a reward's value depends on the pixels, found out at its first use."""
        if not isinstance(value, Tensor) or not value.requires_grad:
            return False
        if name not in self._proved and media.pixels.requires_grad:
            (slope,) = torch.autograd.grad(value.sum(), media.pixels, retain_graph=True, allow_unused=True)
            if slope is None:
                return False
            self._proved.add(name)
        return True


def _guarded(pixels: Tensor, valid: Tensor) -> Tensor:
    """The same pixels; samples that turn out not to be `valid` get no gradient, whatever their reward's backward makes of it."""
    if not (torch.is_grad_enabled() and pixels.requires_grad):
        return pixels
    shown = pixels.view_as(pixels)
    shown.register_hook(lambda slope: torch.where(valid[:, None, None, None, None], slope, 0.0))
    return shown


def _note(seen: dict[str, Tensor], key: str, value: Tensor) -> None:
    """Keep the mean over samples that have a score, if any has."""
    given = value.detach()[value.detach().isfinite()]
    if len(given):
        seen[key] = given.mean()


def _asks(reward: Reward) -> Reward | Judge:
    """Whose network it is."""
    return reward.judge if isinstance(reward, Column) else reward


@torch.no_grad()
def _scored(name: str, reward: Reward, media: Media, prompts: Prompts, known: Known) -> Floats:
    """One reward's scores (N,); what may pass is tried again."""
    for pause in (*PAUSES, None):
        try:
            values = numbers(_asked(name, reward, media, prompts, known), len(prompts))
            break
        except RewardFailed as error:
            if pause is None or error.__cause__ is None or not passing(error.__cause__):
                raise
            time.sleep(pause)
        except ValueError as error:
            raise RewardFailed(f"reward {name}: {error}") from error
    return np.where(np.abs(values) <= LARGEST, values, np.nan)  # sums of larger ones would not be finite


def _asked(name: str, reward: Reward, media: Media, prompts: Prompts, known: Known) -> Any:
    """What a reward returns for samples of its own; a judge that several share is asked once for those at hand."""
    try:
        if isinstance(reward, Column):
            if reward.judge not in known:
                known[reward.judge] = reward.judge(*own(media, prompts))
            return reward.of(known[reward.judge])
        given = own(media, prompts)
        with staying() if reward.background else undisturbed(prompts) if reward.foreign else nullcontext():
            return reward(*given)
    except FAILURES as error:
        if out_of_memory(error):
            raise  # whoever asked can ask for less at a time
        raise RewardFailed(f"reward {name}: {why(error)}") from error
