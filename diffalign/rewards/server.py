"""`diffalign serve-reward`: a reward of ours, or a user's, behind HTTP; see `remote` for the wire format."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from diffalign import __version__
from diffalign.errors import LONGEST, Fault, UserError, shortened, shown
from diffalign.rewards.base import check_media, numbers
from diffalign.rewards.catalog import Entry, find
from diffalign.rewards.isolated import FAILURES, undisturbed, why
from diffalign.rewards.load import load
from diffalign.rewards.wire import TooMuch, unpacked
from diffalign.runtime import json_text
from diffalign.runtime.extras import missing
from diffalign.runtime.serving import guarded, listening, permitted
from diffalign.types import Media, Prompts

Answer = tuple[int, dict[str, Any]]  # status, content
PATIENCE = 30.0  # seconds between pieces of a request


class Served:
    """A reward that answers requests, one at a time: rewards need not stand two threads."""

    def __init__(self, name: str, most_bytes: int = 2**26) -> None:
        self.entry: Entry = find(name)
        self._reward, self._lock = load(name), threading.Lock()
        self._device = "cuda" if torch.cuda.is_available() and not self.entry.background else "cpu"
        self._most = most_bytes
        self._known = {"name": name, "version": __version__}

    def health(self) -> dict[str, Any]:
        """What is served here."""
        entry = self.entry
        facts = {"modality": entry.modality, "needs": list(entry.needs), "range": entry.range, "about": entry.about}
        return self._known | facts

    def answer(self, body: bytes | bytearray) -> Answer:
        """Status and content for the body of a request; one is read and decoded at a time."""
        with self._lock:
            return self._answer(body)

    def _answer(self, body: bytes | bytearray) -> Answer:
        try:
            given = json_text.parse(body)
            if isinstance(body, bytearray):
                body.clear()  # what is read is not held twice
            media, prompts = self._read(given)
        except TooMuch as error:
            return 413, {"error": shortened(str(error), LONGEST)}
        except (ValueError, TypeError, Fault) as error:  # pixels that are none, too
            return 422, {"error": shortened(str(error), LONGEST)}
        try:
            with torch.no_grad(), undisturbed(prompts):
                output = self._reward(media, prompts)
            values = numbers(output, len(prompts))
        except FAILURES as error:
            return self._failed(why(error))
        return 200, self._known | {"scores": [float(v) if np.isfinite(v) else None for v in values]}

    def _failed(self, why: str) -> Answer:
        line = f"reward {self.entry.name}: {why}"
        logging.getLogger("uvicorn.error").error(line, exc_info=sys.exc_info()[1])
        return 500, {"error": line}

    def _read(self, body: Any) -> tuple[Media, Prompts]:
        """Raises ValueError, saying which field is wrong, for what is no request."""
        if not isinstance(body, dict):
            raise ValueError("expected an object with prompts, metadata and media")
        texts, metadata = body.get("prompts"), body.get("metadata")
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError("prompts: expected a list of texts")
        metadata = [{} for _ in texts] if metadata is None else metadata
        objects = isinstance(metadata, list) and all(isinstance(m, dict) for m in metadata)
        if not objects or len(metadata) != len(texts):
            raise ValueError(f"metadata: expected {len(texts)} objects")
        if problem := self.entry.unfit(metadata):
            raise ValueError(f"metadata: {self.entry.name} {problem}")
        pixels = unpacked(body.pop("media", None), self._most)
        if len(pixels) != len(texts):
            raise ValueError(f"media: {len(pixels)} samples for {len(texts)} prompts")
        keys = np.arange(len(texts))
        entries = [{"prompt": text, **m} for text, m in zip(texts, metadata, strict=True)]
        fps = body.get("fps")
        if "fps" in body and (isinstance(fps, bool) or not isinstance(fps, (int, float)) or not 0 < fps < 1000):
            raise ValueError(f"fps: got {shown(fps)}, allowed are numbers above 0")
        media = check_media(Media(pixels.to(self._device), fps))
        return media, Prompts(texts, keys, keys, keys, entries)


class Room:
    """Bytes of requests that are held at once."""

    def __init__(self, most: int) -> None:
        self.most, self.taken = most, 0


async def _receive(request: Any, body: bytearray, most: int, room: Room) -> tuple[int, str]:
    """Put a request's body into `body`; returns 200, or the status and words that refuse it. What the body takes of the room is the
    caller's to give back."""
    stream = request.stream().__aiter__()
    while True:
        try:
            piece = await asyncio.wait_for(stream.__anext__(), PATIENCE)
        except StopAsyncIteration:
            return 200, ""
        except asyncio.TimeoutError:
            return 408, f"nothing came for {PATIENCE} s"
        body += piece
        room.taken += len(piece)
        if len(body) > most:
            return 413, f"more than {most} bytes; send fewer samples"
        if room.taken > room.most:
            return 503, "too many requests at once; try again"


def application(served: Served, token: str | None = None, most_bytes: int = 2**26) -> Any:
    """The FastAPI application of a reward: POST /score and GET /health."""
    import fastapi
    from fastapi.responses import JSONResponse
    from starlette.requests import ClientDisconnect

    room = Room(2 * most_bytes)
    # One thread, always the same: each would keep what it freed to itself.
    worker = ThreadPoolExecutor(1, thread_name_prefix="reward")
    app = fastapi.FastAPI(title="diffalign reward", docs_url=None, redoc_url=None, openapi_url=None)

    async def score(request: Any) -> Any:
        if not permitted(request.headers.get("authorization", ""), token):
            return JSONResponse({"error": "a bearer token is wanted, and this is not it"}, 401)
        body, size = bytearray(), 0
        try:
            refused, said = await _receive(request, body, most_bytes, room)
            if refused != 200:
                return JSONResponse({"error": said}, refused)
            size = len(body)
            status, content = await asyncio.get_running_loop().run_in_executor(worker, served.answer, body)
            return JSONResponse(content, status)
        except ClientDisconnect:  # nobody is there to be answered
            return JSONResponse({"error": "the request broke off"}, 400)
        finally:
            room.taken -= max(size, len(body))

    async def health(request: Any) -> Any:
        return JSONResponse(served.health())

    app.add_route("/score", score, methods=["POST"])
    app.add_route("/health", health, methods=["GET"])
    return app


def serve(name: str, host: str, port: int, token: str | None, most_bytes: int) -> None:
    """Serve a reward until interrupted.

    Raises:
        UserError: if it cannot be served, or the address is open to others and there is no token.
    """
    for module in ("fastapi", "uvicorn"):
        if mend := missing(module):
            raise UserError(f"serve-reward: {module} is not installed; {mend}")
    if find(name).urls:
        raise UserError(f"serve-reward: {name} is behind a server already; name that address in the config")
    token = guarded(host, token)
    app = application(Served(name, most_bytes), token, most_bytes)
    with listening(host, port) as (bound, address):
        import uvicorn

        print(f"{name} at {address}/score", flush=True)
        bound.listen(128)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[bound])
