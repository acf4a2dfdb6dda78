"""Requests that are made again until a deadline, and the tokens they carry."""

from __future__ import annotations

import json
import os
import random
import re
import time
import urllib.parse
from collections.abc import Callable
from typing import Any

from diffalign.errors import Fault, UserError, one_line, shortened, shown
from diffalign.runtime import json_text

TOKEN = "DIFFALIGN_REWARD_TOKEN"  # the variable whose value is sent as a bearer token, and asked for by `serve-reward`
CONNECT, READ, HELLO = 5.0, 120.0, 10.0  # seconds to connect, for an answer, for one to a greeting
PAUSE, LONGEST = 0.5, 30.0  # seconds before the second attempt, doubled each time up to the longest
PIECE, REPLY = 2**16, 2**22  # bytes sent before the deadline is looked at, and of the longest answer
FAILURES = 4  # answers of 500 to one request after which it is not tried again: the reward itself fails
RETRIED = {408, 425, 429, 500, 502, 503, 504}
LATER = RETRIED - {500}  # what is said by a server that is not up yet, or has too much to do


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


class TooLarge(Fault):
    """A server wants fewer samples in a request (413)."""


class _Timed:
    """A network stream, or what opens them, whose every operation ends when `left` says: a byte a second is no progress."""

    def __init__(self, inner: Any, left: Callable[[], float]) -> None:
        self._inner, self._left = inner, left

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def _bounded(self, timeout: float | None) -> float:
        import httpcore

        if (left := self._left()) <= 0:
            raise httpcore.ReadTimeout("the deadline is over")
        return left if timeout is None else min(left, timeout)

    def read(self, most: int, timeout: float | None = None) -> bytes:
        return self._inner.read(most, self._bounded(timeout))

    def write(self, data: bytes, timeout: float | None = None) -> None:
        for start in range(0, len(data), PIECE):
            self._inner.write(data[start : start + PIECE], self._bounded(timeout))

    def start_tls(self, context: Any, name: str | None = None, timeout: float | None = None) -> _Timed:
        return _Timed(self._inner.start_tls(context, name, self._bounded(timeout)), self._left)

    def connect_tcp(self, *args: Any, timeout: float | None = None, **kwargs: Any) -> _Timed:
        return _Timed(self._inner.connect_tcp(*args, timeout=self._bounded(timeout), **kwargs), self._left)


class Patient:
    """Posts JSON, again and again with growing pauses, until `deadline` seconds after `begin`; then there is no answer.

    After a call without any answer the next one tries each request once.
    """

    def __init__(self, token: str | None, deadline: float) -> None:
        import httpx

        self.deadline = deadline
        self.said = ""  # why the last request failed
        bearer = {"Authorization": f"Bearer {token}"} if token else {}
        self._client = httpx.Client(
            timeout=httpx.Timeout(READ, connect=CONNECT), headers={"Accept-Encoding": "identity", **bearer}
        )
        for transport in (self._client._transport, *self._client._mounts.values()):
            pool = getattr(transport, "_pool", None)
            if pool is not None:
                pool._network_backend = _Timed(pool._network_backend, self._left)
        self._once_each, self._until = False, 0.0

    def _left(self) -> float:
        return self._until - time.monotonic()

    def begin(self) -> None:
        """A call begins: requests have until its deadline."""
        self._until = time.monotonic() + self.deadline

    def end(self, answered: bool) -> None:
        """A call is over, and whether any request was answered."""
        self._once_each = not answered

    def post(self, url: Callable[[], str], body: dict[str, Any]) -> Any:
        """The answer's JSON, None if there was none in time; `url` says where the next attempt goes.

        Raises:
            TooLarge: if a server wants a smaller request.
            Fault: if a server refuses the request, or answers no JSON.
        """
        pause, failures, content = PAUSE, 0, json.dumps(body).encode()
        while True:
            try:
                return self._once(url(), content)
            except _Down as error:
                self.said = str(error)
                failures += error.failed
            left = self._left()
            if left <= 0 or failures == FAILURES or self._once_each:
                return None
            time.sleep(min(left, pause * random.uniform(0.5, 1.0)))  # apart, or all come back at once
            if self._left() <= 0:
                return None
            pause = min(2 * pause, LONGEST)

    def _once(self, url: str, content: bytes) -> Any:
        import httpx

        try:
            status, text, where = self._exchange("POST", url, content)
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise Fault(f"{url}: {one_line(error)}") from error
        except httpx.HTTPError as error:
            raise _Down(f"{url}: {one_line(error)}") from error
        said = shortened(text.decode("utf-8", "replace"), 200)
        if status in RETRIED:
            raise _Down(f"{url}: status {status} {said}".rstrip(), failed=status == 500)
        if status == 413:
            raise TooLarge(f"{url} refused (413): {said!r}")
        if status != 200:
            raise Fault(f"{url} refused ({status}{where}): {said!r}")
        try:
            return json_text.parse(text)
        except ValueError as error:
            raise Fault(f"{url} answered {said!r}, expected JSON: {error}") from error

    def _exchange(
        self, method: str, url: str, content: bytes | None = None, read: float = READ
    ) -> tuple[int, bytes, str]:
        """Status, body and redirection of an answer.

        Raises:
            Fault: for one that is longer than any should be, or encoded though we said not to.
        """
        import httpx

        headers = {"Content-Type": "application/json"} if content is not None else {}
        limits = httpx.Timeout(read, connect=CONNECT)
        with self._client.stream(method, url, content=content, headers=headers, timeout=limits) as response:
            if response.headers.get("content-encoding", "identity") != "identity":
                raise Fault(
                    f"{url} answered encoded as {shown(response.headers['content-encoding'])}, expected plain JSON"
                )
            text = bytearray()
            for piece in response.iter_raw():
                text += piece
                if len(text) > REPLY:
                    raise Fault(f"{url} answered more than {REPLY} bytes")
            where = response.headers.get("location", "")
            return response.status_code, bytes(text), f" to {shortened(where)}" if where else ""

    def wait(self, there: Callable[[], bool], where: str, say: Callable[[str], None]) -> bool:
        """Ask with growing pauses until somebody is `there`, for as long as a call may last; whether anybody was. `say` hears once what is
        waited for."""
        pause, until, told = PAUSE, time.monotonic() + self.deadline, False
        self.begin()
        while not there():
            if not told:
                say(f"waiting for {where}, up to {self.deadline:.0f} s ({self.said})")
                told = True
            time.sleep(max(0.0, min(until - time.monotonic(), pause)))
            if time.monotonic() >= until:
                return False
            pause = min(2 * pause, LONGEST)
        return True

    def status(self, url: str) -> int:
        """What a server says to a request with nothing in it; 0 if there is no answer.

        Raises:
            UserError: if that is no address, or another one than the server's.
        """
        return self._greeted("POST", url, b"{}")[0]

    def get(self, url: str) -> tuple[int, Any]:
        """The status and JSON of what a server has at an address; 0 if there is no answer, None if it is no JSON.

        Raises:
            UserError: if that is no address, or another one than the server's.
        """
        status, text = self._greeted("GET", url)
        try:
            return status, json_text.parse(text)
        except ValueError:
            return status, None

    def _greeted(self, method: str, url: str, content: bytes | None = None) -> tuple[int, bytes]:
        import httpx

        try:
            status, text, where = self._exchange(method, url, content, HELLO)
        except (httpx.UnsupportedProtocol, httpx.InvalidURL, httpx.LocalProtocolError) as error:
            raise UserError(f"rewards: {url}: {one_line(error)}") from error
        except httpx.HTTPError as error:
            self.said = f"{url}: {one_line(error)}"
            return 0, b""
        if 300 <= status < 400:
            raise UserError(f"rewards: {url} leads on{where} ({status}); give the address that it leads to")
        if status in RETRIED:
            self.said = f"{url}: status {status} {shortened(text.decode('utf-8', 'replace'), 200)}".rstrip()
        return status, text

    def facts(self, url: str) -> dict[str, Any]:
        """What a server says of itself at /health; nothing where it has none."""
        import httpx

        try:
            status, text, _ = self._exchange("GET", urllib.parse.urljoin(url, "health"), read=HELLO)
            answer = json_text.parse(text) if status == 200 else {}
        except (httpx.HTTPError, ValueError, Fault):
            return {}
        return answer if isinstance(answer, dict) else {}


def reward_token() -> str | None:
    """The token for reward servers, if there is one."""
    return checked_token(os.environ.get(TOKEN), TOKEN)
