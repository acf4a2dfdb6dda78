"""Rewards behind a server: a client that asks one or several of them; see `wire` for the format."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from diffalign.errors import Fault, UserError, shortened
from diffalign.rewards.base import Reward
from diffalign.rewards.wire import packed, scores_of
from diffalign.runtime.http import TOKEN, Patient, TooLarge, reward_token
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

    def greet(self, say: Callable[[str], None] = print) -> None:
        """Wait until a server answers, and find out whether all that do are the same reward.

        Raises:
            UserError: for a wrong path or token, or servers of different rewards.
            Fault: if none answers within the deadline.
        """
        answered: dict[str, int] = {}

        def there() -> bool:
            answered.update({url: self._client.status(url) for url in self.urls})
            return any(answered.values())

        if not self._client.wait(there, " or ".join(self.urls), say):
            raise Fault(f"reward {self.name}: no server answers ({self.said})")
        for url, status in answered.items():
            if status in (401, 403):
                raise UserError(f"rewards: {url} wants another token ({status}); set {TOKEN} as at the server")
            if status in (404, 405):
                raise UserError(f"rewards: {url} is not where scores are ({status}); allowed is http://host:port/score")
        served = {
            url: (shortened(str(f.get("name"))), shortened(str(f.get("version"))))
            for url in self.urls
            if (f := self._client.facts(url))
        }
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
        self._client.end(any(score == score for scores in answers for score in scores))
        return [score for scores in answers for score in scores]

    def _ask(self, media: Media, prompts: Prompts, rows: Sequence[int]) -> list[float]:
        """Scores of some samples, NaN where there is no answer; where a request is too large for a server, in halves."""
        try:
            answer = self._client.post(self._next, self._body(media, prompts, rows))
        except TooLarge:
            if len(rows) == 1:
                raise
            half = len(rows) // 2
            return self._ask(media, prompts, rows[:half]) + self._ask(media, prompts, rows[half:])
        return [float("nan")] * len(rows) if answer is None else scores_of(answer, len(rows))

    def _body(self, media: Media, prompts: Prompts, rows: Sequence[int]) -> dict[str, Any]:
        index = torch.as_tensor(list(rows))
        return {
            "prompts": [prompts.text[k] for k in rows],
            "metadata": [prompts.metadata[k] for k in rows],
            **({} if media.fps is None else {"fps": media.fps}),
            "media": packed(Media(media.pixels[index], media.fps)),
        }

    def _next(self) -> str:
        with self._lock:
            self._turn += 1
            return self.urls[self._turn % len(self.urls)]
