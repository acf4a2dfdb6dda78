"""`diffalign serve-reward`: a reward of ours, or a user's, behind HTTP; see `remote` for the wire format."""

from __future__ import annotations

import hmac
import json
import logging
import threading
from typing import Any

import numpy as np
import torch

from diffalign import __version__
from diffalign.errors import Fault, UserError, one_line
from diffalign.rewards.base import check_media
from diffalign.rewards.catalog import Entry, find
from diffalign.rewards.load import load
from diffalign.rewards.wire import unpacked
from diffalign.runtime.extras import missing
from diffalign.runtime.http import checked_token
from diffalign.types import Media, Prompts

Answer = tuple[int, dict[str, Any]]  # status, content


class Served:
    """A reward that answers requests, one at a time: rewards need not stand two threads."""

    def __init__(self, name: str) -> None:
        self.entry: Entry = find(name)
        self._reward, self._lock = load(name), threading.Lock()
        self._device = "cuda" if torch.cuda.is_available() and not self.entry.background else "cpu"
        self._known = {"name": name, "version": __version__}

    def health(self) -> dict[str, Any]:
        """What is served here."""
        entry = self.entry
        facts = {"modality": entry.modality, "needs": list(entry.needs), "range": entry.range, "about": entry.about}
        return self._known | facts

    def answer(self, body: bytes) -> Answer:
        """Status and content for the body of a request."""
        try:
            media, prompts = self._read(json.loads(body))
        except RecursionError:
            return 422, {"error": "not JSON (nested too deeply)"}
        except json.JSONDecodeError as error:
            return 422, {"error": f"not JSON ({one_line(error)})"}
        except (ValueError, TypeError) as error:
            return 422, {"error": str(error)}
        except Fault as error:  # pixels that are none
            return 422, {"error": str(error)}
        try:
            with self._lock, torch.no_grad():
                output = self._reward(media, prompts)
            values = torch.as_tensor(output).detach().cpu().double().numpy()
        except Exception as error:  # whatever a user's function does
            return self._failed(one_line(error))
        if values.shape != (len(prompts),):
            return self._failed(f"returned shape {values.shape} for {len(prompts)} samples")
        return 200, self._known | {"scores": [float(v) if np.isfinite(v) else None for v in values]}

    def _failed(self, why: str) -> Answer:
        line = f"reward {self.entry.name}: {why}"
        logging.getLogger("uvicorn.error").error(line)
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
        pixels = unpacked(body.get("media"))
        if len(pixels) != len(texts):
            raise ValueError(f"media: {len(pixels)} samples for {len(texts)} prompts")
        keys = np.arange(len(texts))
        entries = [{"prompt": text, **m} for text, m in zip(texts, metadata, strict=True)]
        fps = body.get("fps", 8.0)
        if isinstance(fps, bool) or not isinstance(fps, (int, float)) or not 0 < fps < 1000:
            raise ValueError(f"fps: got {fps!r}, allowed are numbers above 0")
        media = check_media(Media(pixels.to(self._device), float(fps)))
        return media, Prompts(texts, keys, keys, keys, entries)


def application(served: Served, token: str | None = None, most_bytes: int = 2**28) -> Any:
    """The FastAPI application of a reward: POST /score and GET /health."""
    import fastapi
    from fastapi.concurrency import run_in_threadpool
    from fastapi.responses import JSONResponse

    app = fastapi.FastAPI(title="diffalign reward", docs_url=None, redoc_url=None, openapi_url=None)

    async def score(request: Any) -> Any:
        given = request.headers.get("authorization", "")
        if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            return JSONResponse({"error": "a bearer token is wanted, and this is not it"}, 401)
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > most_bytes:
                return JSONResponse({"error": f"more than {most_bytes} bytes; send fewer samples"}, 413)
        status, content = await run_in_threadpool(served.answer, bytes(body))
        return JSONResponse(content, status)

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
    import socket

    for module in ("fastapi", "uvicorn"):
        if mend := missing(module):
            raise UserError(f"serve-reward: {module} is not installed; {mend}")
    token = checked_token(token, "--token")
    if find(name).urls:
        raise UserError(f"serve-reward: {name} is behind a server already; name that address in the config")
    if host not in ("127.0.0.1", "localhost", "::1") and token is None:
        raise UserError(
            f"--host: got {host}, which others can reach; set a token (--token or DIFFALIGN_REWARD_TOKEN), or allowed is 127.0.0.1"
        )
    app = application(Served(name), token, most_bytes)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            field = "--host" if isinstance(error, socket.gaierror) else "--port"
            raise UserError(f"{field}: {host}:{port}: {error.strerror or error}; name another") from error
        import uvicorn

        address = f"http://{f'[{host}]' if ':' in host else host}:{probe.getsockname()[1]}/score"
        print(f"{name} at {address}", flush=True)
        probe.listen(128)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[probe])
