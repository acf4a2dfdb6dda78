"""A reward server for environments that cannot hold diffalign: the standard library and Pillow, Python 3.8 or newer.

    from standalone import serve

    def score(frames, prompts, metadata, fps):
        # frames: for every sample a list of PIL pictures, one for an image; a number each, None where there is no score
        return [0.5 for _ in prompts]

    serve(score, name="mine", version="1")

The wire format is that of `diffalign.rewards.wire`; a config names the server `http://127.0.0.1:8090/score`.
"""

from __future__ import annotations

import argparse
import base64
import hmac
import io
import json
import math
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

TOKEN = "DIFFALIGN_REWARD_TOKEN"  # the variable with the bearer token that clients must send
MOST_PIXELS = 2**28  # of a request, decoded


class Refused(Exception):
    """A request that is none: status 422, the message says which field is wrong."""


def unpacked(media):
    """Samples as lists of PIL pictures, from `media` of a request."""
    if not isinstance(media, dict) or media.get("format") not in ("png", "raw"):
        raise Refused("media: expected an object with format png or raw")
    return _raw(media) if media["format"] == "raw" else _pngs(media.get("data"))


def _bytes(text):
    try:
        return base64.b64decode(text, validate=True)
    except (ValueError, TypeError):
        raise Refused("media.data: not base64") from None


def _raw(media):
    data, shape = _bytes(media.get("data")), media.get("shape")
    whole = isinstance(shape, list) and len(shape) == 5 and all(type(n) is int and n > 0 for n in shape)
    size = 1
    for n in shape if whole else ():
        size *= n
    if not whole or shape[4] != 3 or size != len(data):
        raise Refused(f"media: shape {shape} does not fit {len(data)} bytes; expected [n, frames, height, width, 3]")
    samples, frames, height, width, _ = shape
    step = height * width * 3
    shots = [Image.frombytes("RGB", (width, height), data[k * step : (k + 1) * step]) for k in range(samples * frames)]
    return [shots[k * frames : (k + 1) * frames] for k in range(samples)]


def _pngs(samples):
    if not isinstance(samples, list) or not samples or not all(isinstance(s, list) and s for s in samples):
        raise Refused("media.data: expected a list of lists of PNG files, one a frame")
    pixels = 0
    found = []
    for sample in samples:
        frames = []
        for text in sample:
            try:
                picture = Image.open(io.BytesIO(_bytes(text)), formats=("PNG",))
                pixels += picture.width * picture.height
                if pixels > MOST_PIXELS:  # a small file can be a huge picture
                    raise Refused(f"media.data: more than {MOST_PIXELS} pixels; send fewer samples")
                frames.append(picture.convert("RGB"))
            except (OSError, SyntaxError, Image.DecompressionBombError) as error:
                raise Refused(f"media.data: not a PNG file ({error})") from None
        found.append(frames)
    return found


def asked(body, needs=()):
    """Frames, prompts, metadata and frames per second of a request's body."""
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(f"not JSON ({error})") from None
    if not isinstance(given, dict):
        raise Refused("expected an object with prompts, metadata and media")
    prompts = given.get("prompts")
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise Refused("prompts: expected a list of texts")
    metadata = given.get("metadata") or [{} for _ in prompts]
    if (
        not isinstance(metadata, list)
        or len(metadata) != len(prompts)
        or not all(isinstance(m, dict) for m in metadata)
    ):
        raise Refused(f"metadata: expected {len(prompts)} objects")
    for key in needs:
        if any(key not in m for m in metadata):
            raise Refused(f"metadata: {key} is needed in every object")
    fps = given.get("fps", 8.0)
    if isinstance(fps, bool) or not isinstance(fps, (int, float)) or not 0 < fps < 1000:
        raise Refused(f"fps: got {fps!r}, allowed are numbers above 0")
    frames = unpacked(given.get("media"))
    if len(frames) != len(prompts):
        raise Refused(f"media: {len(frames)} samples for {len(prompts)} prompts")
    return frames, prompts, [{"prompt": p, **m} for p, m in zip(prompts, metadata)], float(fps)  # noqa: B905 - Python 3.8 has no strict


def answer(scores, count):
    """Scores as JSON has them: null for what is no finite number.

    Raises:
        ValueError: if there are not as many as samples.
    """
    values = [None if value is None else float(value) for value in scores]
    if len(values) != count:
        raise ValueError(f"returned {len(values)} scores for {count} samples")
    return [value if value is not None and math.isfinite(value) else None for value in values]


def handler(score, facts, needs, token, most_bytes):
    """The class that answers requests; scores are asked for one request at a time."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self, status, content):
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            if status in (401, 404, 411, 413):  # the body was not read
                self.send_header("Connection", "close")
                self.close_connection = True
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self.reply(200, facts) if self.path == "/health" else self.reply(404, {"error": "GET /health, POST /score"})

        def do_POST(self):
            if self.path != "/score":
                return self.reply(404, {"error": "GET /health, POST /score"})
            given = self.headers.get("Authorization", "")
            if token and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
                return self.reply(401, {"error": "a bearer token is wanted, and this is not it"})
            length = self.headers.get("Content-Length", "")
            if not (length.isascii() and length.isdigit()):
                return self.reply(411, {"error": "Content-Length is wanted"})
            if int(length) > most_bytes:
                return self.reply(413, {"error": f"more than {most_bytes} bytes; send fewer samples"})
            body = self.rfile.read(int(length))
            try:
                frames, prompts, metadata, fps = asked(body, needs)
            except Refused as error:
                return self.reply(422, {"error": str(error)})
            try:
                with lock:
                    found = answer(score(frames, prompts, metadata, fps), len(prompts))
            except Exception as error:  # whatever the model does: the client tries again, and then has no score
                line = f"reward {facts['name']}: {type(error).__name__}: {error}"
                print(line, file=sys.stderr, flush=True)
                return self.reply(500, {"error": line})
            return self.reply(200, {**facts, "scores": found})

        def log_message(self, *arguments):
            """Only failures are told."""

    return Handler


def serve(score, name, version, needs=(), about=""):
    """Serve a reward until interrupted; --host, --port and --max-mib on the command line.

    Others can reach it only with a token in the environment.
    """
    parser = argparse.ArgumentParser(description=about or f"serve {name}")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8090)
    parser.add_argument("--max-mib", type=int, default=256)
    options = parser.parse_args()
    token = os.environ.get(TOKEN)
    if options.host not in ("127.0.0.1", "localhost", "::1") and not token:
        parser.error(f"--host: got {options.host}, which others can reach; set a token in {TOKEN}")
    facts = {"name": name, "version": version, "about": about}
    try:
        server = ThreadingHTTPServer(
            (options.host, options.port), handler(score, facts, needs, token, options.max_mib * 2**20)
        )
    except (OSError, OverflowError) as error:
        parser.error(f"--port: {options.host}:{options.port}: {error}; name another")
    print(f"{name} at http://{options.host}:{server.server_address[1]}/score", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()
