"""Rewards behind a server: a client that asks one or several of them; see `wire` for the format."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from diffalign.errors import Fault, UserError
from diffalign.rewards.base import Reward
from diffalign.rewards.wire import packed
from diffalign.runtime import http
from diffalign.runtime.http import TOKEN, Patient, reward_token
from diffalign.types import Media, Prompts, chunks

IN_FLIGHT = 2  # requests a server works on at once: one scores while the next one travels


class Remote(Reward):
    """A reward behind one or several servers that give the same scores: requests of `batch` samples go round them.

    A request that does not come through is tried again at the next server until the call's deadline; what then has no answer has no score.
    """

    background = True

    def __init__(self, name: str, urls: Sequence[str], deadline: float = 300.0, batch: int = 16) -> None:
        self.name, self.urls, self.batch = name, list(urls), batch
        self._client = Patient(reward_token(), deadline)
        self._turn, self._lock = 0, threading.Lock()

    @property
    def said(self) -> str:
        """Why the last request failed."""
        return self._client.said

    def greet(self) -> None:
        """Wait until a server answers, and find out whether all that do are the same reward.

        Raises:
            UserError: for a wrong path or token, or servers of different rewards.
            Fault: if none answers within the deadline.
        """
        pause, until = http.PAUSE, time.monotonic() + self._client.deadline
        while not any((answered := {url: self._client.status(url) for url in self.urls}).values()):
            if (left := until - time.monotonic()) <= 0:
                raise Fault(f"reward {self.name}: no server answers ({self.said})")
            time.sleep(min(left, pause))
            pause = min(2 * pause, http.LONGEST)
        for url, status in answered.items():
            if status in (401, 403):
                raise UserError(f"rewards: {url} wants another token ({status}); set {TOKEN} as at the server")
            if status in (404, 405):
                raise UserError(f"rewards: {url} is not where scores are ({status}); allowed is http://host:port/score")
        served = {url: (f.get("name"), f.get("version")) for url in self.urls if (f := self._client.facts(url))}
        if len(set(served.values())) > 1:
            raise UserError(
                "rewards: addresses with | between them must serve one reward, they serve "
                + ", ".join(f"{name} {version} at {url}" for url, (name, version) in served.items())
            )

    def __call__(self, media: Media, prompts: Prompts) -> list[float]:
        """Scores (n,) in the order of the samples, NaN where no server gave one.

        Raises:
            Fault: if a server refuses the request or gives another number of scores.
        """
        parts = list(chunks(len(prompts), self.batch))
        self._client.begin()
        with ThreadPoolExecutor(IN_FLIGHT * len(self.urls)) as pool:
            answers = list(pool.map(lambda rows: self._ask(media, prompts, rows), parts))
        self._client.end(any(answer is not None for answer in answers))
        return [score for rows, answer in zip(parts, answers, strict=True) for score in self._read(answer, len(rows))]

    def _ask(self, media: Media, prompts: Prompts, rows: Sequence[int]) -> Any:
        index = torch.as_tensor(list(rows))
        body = {
            "prompts": [prompts.text[k] for k in rows],
            "metadata": [prompts.metadata[k] for k in rows],
            "fps": media.fps,
            "media": packed(Media(media.pixels[index], media.fps)),
        }
        return self._client.post(self._next, body)

    def _next(self) -> str:
        with self._lock:
            self._turn += 1
            return self.urls[self._turn % len(self.urls)]

    def _read(self, answer: Any, count: int) -> list[float]:
        """The scores of an answer, NaN without."""
        if answer is None:
            return [float("nan")] * count
        try:
            scores = [float("nan") if score is None else float(score) for score in answer["scores"]]
        except (ValueError, KeyError, TypeError) as error:
            raise Fault(f"{str(answer)[:200]!r} was answered, expected scores") from error
        if len(scores) != count:
            raise Fault(f"gave {len(scores)} scores for {count} samples")
        return scores
