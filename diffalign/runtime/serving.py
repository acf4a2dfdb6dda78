"""What servers of ours share: an address that is open to others wants a token, and mistakes in it are one line."""

from __future__ import annotations

import base64
import binascii
import hmac
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from diffalign.errors import UserError
from diffalign.runtime.http import TOKEN, checked_token

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def guarded(host: str, token: str | None) -> str | None:
    """The token that requests must carry, None for a loopback address without one.

    Raises:
        UserError: if headers cannot carry it, or the address is open to others and there is none.
    """
    token = checked_token(token, "--token")
    if host not in LOOPBACK and token is None:
        raise UserError(
            f"--host: got {host}, which others can reach; set a token (--token or {TOKEN}), or allowed is 127.0.0.1"
        )
    return token


@contextmanager
def listening(host: str, port: int) -> Iterator[tuple[socket.socket, str]]:
    """A bound socket and its address as `http://HOST:PORT`; port 0: any free one.

    Raises:
        UserError: if the address does not exist, or is in use.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((host, port))
        except OSError as error:
            field = "--host" if isinstance(error, socket.gaierror) else "--port"
            raise UserError(f"{field}: {host}:{port}: {error.strerror or error}; name another") from error
        yield bound, f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}"


def permitted(header: str, token: str | None) -> bool:
    """Whether an Authorization header carries a token: as a bearer's, or as the password of any name, which browsers ask for."""
    if token is None:
        return True
    kind, _, given = header.partition(" ")
    if kind.lower() == "basic":
        try:
            given = base64.b64decode(given, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return False
    elif kind != "Bearer":
        return False
    return hmac.compare_digest(given.encode(), token.encode())
