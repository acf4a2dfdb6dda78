"""Requests that are made again until a deadline, and the tokens they carry."""

from __future__ import annotations

import os
import random
import re
import time
import urllib.parse
from collections.abc import Callable
from typing import Any

from diffalign.errors import Fault, UserError, one_line

TOKEN = "DIFFALIGN_REWARD_TOKEN"  # the variable whose value is sent as a bearer token, and asked for by `serve-reward`
CONNECT, READ = 5.0, 120.0  # seconds
PAUSE, LONGEST = 0.5, 30.0  # seconds before the second attempt, doubled each time up to the longest
FAILURES = 4  # answers of 500 to one request after which it is not tried again: the reward itself fails
RETRIED = {408, 425, 429, 500, 502, 503, 504}


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
            said = f"{url}: status {response.status_code} {response.text[:200]}".rstrip()
            raise _Down(said, failed=response.status_code == 500)
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
            answer = response.json() if response.status_code == 200 else {}
        except (httpx.HTTPError, ValueError):
            return {}
        return answer if isinstance(answer, dict) else {}


def reward_token() -> str | None:
    """The token for reward servers, if there is one."""
    return checked_token(os.environ.get(TOKEN), TOKEN)
