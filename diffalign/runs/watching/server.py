"""`diffalign watch`: the pages of runs, served as they go on. It reads and never writes."""

from __future__ import annotations

import hashlib
import ipaddress
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from diffalign.errors import UserError, one_line
from diffalign.runs.folder import PAGE
from diffalign.runs.watching import gallery, live, page
from diffalign.runs.watching.reading import Record, is_run, read
from diffalign.runtime.serving import LOOPBACK, guarded, listening, permitted

HEADERS = {
    # Pages hold all they need; what a prompt or a name smuggled in could neither load nor send anything.
    "Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
PATIENCE = 30.0  # seconds for a request to come in
HTML, TEXT = "text/html; charset=utf-8", "text/plain; charset=utf-8"


class Watched:
    """A run, or the runs under a folder. Records are kept until their files change; several threads ask."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._lock = folder, threading.Lock()
        self._kept: dict[Path, tuple[tuple[int, ...], Record | UserError]] = {}

    @property
    def alone(self) -> bool:
        """Whether the folder is one run's."""
        return is_run(self.folder)

    def answer(self, path: str, version: bool) -> str | None:
        """The page at a path, or its version; None where there is none."""
        with self._lock:
            if path == "/":
                return self._page(self.folder, "", version) if self.alone else self._list(version)
            if path == "/report" and not version and not self.alone:
                report = self.folder / PAGE
                return report.read_text(encoding="utf-8") if report.is_file() else None
            if path.startswith("/run/") and path.endswith("/"):
                name = unquote(path.removeprefix("/run/").removesuffix("/"))
                found = gallery.runs(self.folder)
                # Only what was found is looked up, so that no name leads out of the folder.
                if name in found:
                    return self._page(found[name], "../" * (2 + name.count("/")), version)
            return None

    def _record(self, place: Path) -> Record | UserError:
        now = live.stamp(place)
        if place not in self._kept or self._kept[place][0] != now:
            try:
                self._kept[place] = now, read(place)
            except UserError as error:
                self._kept[place] = now, error
        return self._kept[place][1]

    def _page(self, place: Path, root: str, version: bool) -> str:
        record = self._record(place)
        if isinstance(record, UserError):
            raise record
        state = live.state(record)
        own = _digest(live.stamp(place), state)
        return own if version else page.render(record, state, own, root)

    def _list(self, version: bool) -> str:
        found = gallery.runs(self.folder)
        rows = [gallery.row(name, self._record(place)) for name, place in found.items()]
        own = _digest(*((name, live.stamp(place)) for name, place in found.items()), [row["state"] for row in rows])
        return own if version else gallery.render(str(self.folder), rows, own, (self.folder / PAGE).is_file())


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


class _Handler(BaseHTTPRequestHandler):
    timeout = PATIENCE
    server: Server
    server_version, sys_version = "diffalign", ""

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        if not self.server.known(self.headers.get("host", "")):
            self._send(421, "this server has another name")
        elif not permitted(self.headers.get("authorization", ""), self.server.token):
            self._send(401, "a token is wanted: as a bearer's, or as the password of any name", realm=True)
        else:
            try:
                found = self.server.watched.answer(address.path, address.query == "version")
            except (UserError, OSError) as error:
                self._send(500, str(error))
            except Exception as error:  # a bug of ours: it is told where the server runs, and the server goes on
                print(f"diffalign watch: {address.path}: {one_line(error)}", file=sys.stderr)
                self._send(500, one_line(error))
            else:
                if found is None:
                    self._send(404, "there is no such run here")
                else:
                    self._send(200, found, TEXT if address.query == "version" else HTML)

    do_HEAD = do_GET

    def _send(self, status: int, text: str, kind: str = TEXT, realm: bool = False) -> None:
        body = text.encode()
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        if realm:
            self.send_header("WWW-Authenticate", 'Basic realm="diffalign watch", charset="UTF-8"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not told: a page asks every two seconds."""


class Server(ThreadingHTTPServer):
    """Serves what is watched on a bound socket. token: what requests must carry, None: nothing."""

    daemon_threads = True

    def __init__(self, watched: Watched, bound: Any, token: str | None) -> None:
        super().__init__(bound.getsockname()[:2], _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket, self.watched, self.token = bound, watched, token
        self.open = not ipaddress.ip_address(bound.getsockname()[0]).is_loopback
        self.server_activate()

    def known(self, host: str) -> bool:
        """Whether a request names this server: on a loopback address a foreign name is another page's, which would read through the
        user's browser."""
        name = urlsplit(f"//{host}").hostname
        return self.open or self.token is not None or name in LOOPBACK

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is nothing to tell of."""
        if not isinstance(error := sys.exc_info()[1], (ConnectionError, TimeoutError)):
            print(f"diffalign watch: {one_line(error) if error else 'a request failed'}", file=sys.stderr)


def serve(folder: Path, host: str, port: int, token: str | None) -> None:
    """Serve a run's page, or a list of the runs under a folder, until interrupted.

    Raises:
        UserError: if no run is there, the address is in use, or it is open to others and there is no token.
    """
    if not folder.is_dir() or not gallery.runs(folder):
        raise UserError(
            f"watch: {folder} holds no run; allowed is a run's folder, or one with runs at most {gallery.DEEP} folders below"
        )
    token = guarded(host, token)
    with listening(host, port) as (bound, address):
        server = Server(Watched(folder), bound, token)
        print(f"{folder} at {address}/", flush=True)
        server.serve_forever()
