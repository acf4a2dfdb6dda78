"""Rewards behind a server: the wire format, and a client that asks one or several of them.

A request is JSON: `prompts` (n texts), `metadata` (n objects), `fps`, and `media`: either {"format": "png", "data": n lists of one
base64 PNG a frame} or {"format": "raw", "shape": [n, frames, height, width, 3], "data": base64 of uint8}. The answer is
{"name": ..., "version": ..., "scores": n numbers, null where there is none}. Pixels travel as uint8 without loss, never pickled.
"""

from __future__ import annotations

import base64
import io
import math
import os
import random
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from diffalign.errors import Fault, UserError, one_line
from diffalign.rewards.base import to_uint8
from diffalign.types import Media, Prompts, chunks

TOKEN = "DIFFALIGN_REWARD_TOKEN"  # the variable whose value is sent as a bearer token, and asked for by `serve-reward`
CONNECT, READ = 5.0, 120.0  # seconds
PAUSE, LONGEST = 0.5, 30.0  # seconds before the second attempt, doubled each time up to the longest
FAILURES = 4  # answers of 500 to one request after which it is not tried again: the reward itself fails
PIXELS = 2**28  # of a request, decoded: a small PNG file can be a huge picture
IN_FLIGHT = 2  # requests a server works on at once: one scores while the next one travels
RETRIED = {408, 425, 429, 500, 502, 503, 504}


def packed(media: Media, form: str = "png") -> dict[str, Any]:
    """Media as JSON; `form` is png or raw."""
    frames = to_uint8(media)
    if form == "raw":
        return {"format": "raw", "shape": list(frames.shape), "data": base64.b64encode(frames.tobytes()).decode()}
    return {"format": "png", "data": [[_png(frame) for frame in sample] for sample in frames]}


def _png(frame: NDArray[np.uint8]) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode()


def unpacked(given: Any) -> torch.Tensor:
    """Pixels (n, F, 3, H, W) float in [0, 1] of what `packed` makes.

    Raises:
        ValueError: saying what is wrong with it.
    """
    if not isinstance(given, dict) or given.get("format") not in ("png", "raw"):
        raise ValueError("media: expected an object with format png or raw")
    frames = _raw(given) if given["format"] == "raw" else _pngs(given.get("data"))
    return torch.from_numpy(frames).permute(0, 1, 4, 2, 3).float() / 255


def _raw(given: dict[str, Any]) -> NDArray[np.uint8]:
    data = _bytes(given.get("data"), "media.data")
    shape: Any = given.get("shape")
    whole = isinstance(shape, list) and len(shape) == 5 and all(type(n) is int and n > 0 for n in shape)
    if not whole or shape[-1] != 3 or math.prod(shape) != len(data):
        raise ValueError(f"media: shape {shape} does not fit {len(data)} bytes; expected [n, frames, height, width, 3]")
    return np.frombuffer(data, np.uint8).reshape(shape).copy()


def _pngs(samples: Any) -> NDArray[np.uint8]:
    from PIL import Image

    if not isinstance(samples, list) or not samples or not all(isinstance(s, list) and s for s in samples):
        raise ValueError("media.data: expected a list of lists of PNG files, one a frame")
    found, pixels = [], 0
    for sample in samples:
        frames = []
        for text in sample:
            try:
                with Image.open(io.BytesIO(_bytes(text, "media.data")), formats=("PNG",)) as picture:
                    pixels += picture.width * picture.height
                    if pixels > PIXELS:
                        raise ValueError(f"media.data: more than {PIXELS} pixels; send fewer samples")
                    frames.append(np.asarray(picture.convert("RGB")))
            except (OSError, SyntaxError, Image.DecompressionBombError) as error:
                raise ValueError(f"media.data: not a PNG file ({one_line(error)})") from error
        found.append(frames)
    if len({tuple(frame.shape for frame in frames) for frames in found}) > 1:
        raise ValueError("media.data: samples of one request must have one size and number of frames")
    return np.stack([np.stack(frames) for frames in found])


def _bytes(text: Any, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: not base64") from error


class _Down(Exception):
    """A request did not come through; it may at the next attempt. failed: the server is there and its reward failed."""

    def __init__(self, why: str, failed: bool = False) -> None:
        super().__init__(why)
        self.failed = failed


def checked_token(token: str | None, field: str) -> str | None:
    """A bearer token as headers can carry it.

    Raises:
        UserError: for one that they cannot.
    """
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise UserError(f"{field}: allowed are printable ASCII characters without spaces, one at least")
    return token


def openai_key() -> str | None:
    """The key for OpenAI-compatible endpoints, if there is one."""
    return os.environ.get("OPENAI_API_KEY")


class Patient:
    """Posts JSON, again and again with growing pauses, until `deadline` seconds after `begin`; then there is no answer.

    After a call without any answer the next one tries each request once.
    """

    def __init__(self, token: str | None, deadline: float) -> None:
        import httpx

        self.deadline = deadline
        self.said = ""  # why the last request failed
        self._client = httpx.Client(
            timeout=httpx.Timeout(READ, connect=CONNECT), headers={"Authorization": f"Bearer {token}"} if token else {}
        )
        self._down, self._until = False, 0.0

    def begin(self) -> None:
        """A call begins: requests have until its deadline."""
        self._until = time.monotonic() + (0.0 if self._down else self.deadline)

    def end(self, answered: bool) -> None:
        """A call is over, and whether any request was answered."""
        self._down = not answered

    def post(self, url: Callable[[], str], body: dict[str, Any]) -> Any:
        """The answer's JSON, None if there was none in time; `url` says where the next attempt goes.

        Raises:
            Fault: if a server refuses the request, or answers no JSON.
        """
        pause, failures = PAUSE, 0
        while True:
            try:
                return self._once(url(), body)
            except _Down as error:
                self.said = str(error)
                failures += error.failed
            left = self._until - time.monotonic()
            if left <= 0 or failures == FAILURES:
                return None
            time.sleep(min(left, pause * random.uniform(0.5, 1.0)))  # apart, or all come back at once
            pause = min(2 * pause, LONGEST)

    def _once(self, url: str, body: dict[str, Any]) -> Any:
        import httpx

        try:
            response = self._client.post(url, json=body)
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise Fault(f"{url}: {one_line(error)}") from error
        except httpx.HTTPError as error:
            raise _Down(f"{url}: {one_line(error)}") from error
        if response.status_code in RETRIED:
            told = f"{url}: status {response.status_code} {response.text[:200]}".rstrip()
            raise _Down(told, failed=response.status_code == 500)
        if response.status_code != 200:
            raise Fault(f"{url} refused ({response.status_code}): {response.text[:300]!r}")
        try:
            return response.json()
        except ValueError as error:
            raise Fault(f"{url} answered {response.text[:200]!r}, expected JSON") from error

    def status(self, url: str) -> int:
        """What a server says to a request with nothing in it; 0 if there is no answer."""
        import httpx

        try:
            return self._client.post(url, json={}).status_code
        except (httpx.UnsupportedProtocol, httpx.InvalidURL, httpx.LocalProtocolError) as error:
            raise UserError(f"rewards: {url}: {one_line(error)}") from error
        except httpx.HTTPError as error:
            self.said = f"{url}: {one_line(error)}"
            return 0

    def facts(self, url: str) -> dict[str, Any]:
        """What a server says of itself at /health; nothing where it has none."""
        import httpx

        try:
            response = self._client.get(urllib.parse.urljoin(url, "health"))
            found = response.json() if response.status_code == 200 else {}
        except (httpx.HTTPError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


class Remote:
    """A reward behind one or several servers that give the same scores: requests of `batch` samples go round them.

    A request that does not come through is tried again at the next server until the call's deadline; what then has no answer has no score.
    """

    background = True

    def __init__(self, name: str, urls: Sequence[str], deadline: float = 300.0, batch: int = 16) -> None:
        self.name, self.urls, self.batch = name, list(urls), batch
        self._client = Patient(checked_token(os.environ.get(TOKEN), TOKEN), deadline)
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
        pause, until = PAUSE, time.monotonic() + self._client.deadline
        while not any((answered := {url: self._client.status(url) for url in self.urls}).values()):
            if (left := until - time.monotonic()) <= 0:
                raise Fault(f"reward {self.name}: no server answers ({self.said})")
            time.sleep(min(left, pause))
            pause = min(2 * pause, LONGEST)
        for url, status in answered.items():
            if status in (401, 403):
                raise UserError(f"rewards: {url} wants another token ({status}); set {TOKEN} as at the server")
            if status in (404, 405):
                raise UserError(f"rewards: {url} is not where scores are ({status}); allowed is http://host:port/score")
        told = {url: (f.get("name"), f.get("version")) for url in self.urls if (f := self._client.facts(url))}
        if len(set(told.values())) > 1:
            raise UserError(
                "rewards: addresses with | between them must serve one reward, they serve "
                + ", ".join(f"{name} {version} at {url}" for url, (name, version) in told.items())
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
            found = [float("nan") if score is None else float(score) for score in answer["scores"]]
        except (ValueError, KeyError, TypeError) as error:
            raise Fault(f"{str(answer)[:200]!r} was answered, expected scores") from error
        if len(found) != count:
            raise Fault(f"gave {len(found)} scores for {count} samples")
        return found
