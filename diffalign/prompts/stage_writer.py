"""Stage prompts from a language model behind an OpenAI-compatible endpoint, written to a file once (RLR's chain of thought)."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from diffalign.errors import Fault, UserError, one_line
from diffalign.prompts.files import Entry
from diffalign.runtime import json_text

ATTEMPTS, PAUSE = 4, 1.0  # tries a prompt; seconds before the second, doubled each time
TIMEOUT = 120.0
ASK = """An image generator works in {count} stages, from coarse to fine. Rewrite the prompt below for each of them: the first says what \
is there and how it is arranged, later ones add shape and geometry, the last adds colour, material and detail. Keep every fact of \
the prompt, invent none, and keep its wording where you can. Answer with a JSON list of {count} strings and nothing else.

Prompt: {prompt}"""


def write(
    entries: list[Entry], path: Path, endpoint: str, model: str, key: str | None, count: int, say: Callable[[str], None]
) -> int:
    """Ask for every prompt that the file lacks and append its line; returns how many were asked for.

    Args:
        endpoint: address below which `/chat/completions` lies, such as http://localhost:8000/v1.
        key: sent as a bearer token if given.
        count: stages a prompt.

    Raises:
        UserError: if the file holds something else, or the endpoint refuses the request.
        Fault: if the endpoint does not answer, or not with such a list; what was written stays and is not asked for again.
    """
    import httpx

    there = set(_written(path, count))
    path.parent.mkdir(parents=True, exist_ok=True)
    wanted = [prompt for prompt in dict.fromkeys(entry["prompt"] for entry in entries) if prompt not in there]
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx.Client(timeout=TIMEOUT, headers=headers) as client, path.open("a", encoding="utf-8") as file:
            for number, prompt in enumerate(wanted, 1):
                texts = _ask(client, f"{endpoint.rstrip('/')}/chat/completions", model, prompt, count)
                file.write(json.dumps({"prompt": prompt, "stages": texts}, ensure_ascii=False) + "\n")
                file.flush()
                say(f"{number}/{len(wanted)} {prompt} -> {' | '.join(texts)}")
    except httpx.InvalidURL as error:
        raise UserError(f"--endpoint: got {endpoint!r}: {one_line(error)}") from error
    return len(wanted)


def _written(path: Path, count: int) -> Iterator[str]:
    """Prompts a file already has."""
    if not path.exists():
        return
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line:
            continue
        try:
            entry = json_text.parse(line)
            prompt, texts = entry["prompt"], list(entry["stages"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--out: {path} line {number} is no stage prompt ({one_line(error)}); name another file"
            ) from error
        if len(texts) != count:
            raise UserError(f"--out: {path} line {number} has {len(texts)} stages, not {count}; name another file")
        yield prompt


def _ask(client: Any, url: str, model: str, prompt: str, count: int) -> list[str]:
    import httpx

    body = {"model": model, "messages": [{"role": "user", "content": ASK.format(count=count, prompt=prompt)}]}
    problem, pause = "", PAUSE
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(pause)
            pause *= 2
        try:
            response = client.post(url, json=body)
        except httpx.UnsupportedProtocol as error:
            raise UserError(f"--endpoint: {url}: {one_line(error)}") from error
        except httpx.TransportError as error:
            problem = one_line(error)
            continue
        if 400 <= response.status_code < 500 and response.status_code != 429:
            raise UserError(f"--endpoint: {url} refused ({response.status_code}): {response.text[:200]!r}")
        if response.status_code != 200:
            problem = f"status {response.status_code}"
            continue
        texts = _parsed(response, count)
        if texts is not None:
            return texts
        problem = f"no JSON list of {count} strings in {response.text[:200]!r}"
    raise Fault(
        f"stages: {url} gave nothing for {prompt!r} in {ATTEMPTS} attempts: {problem}; the same command goes on from here"
    )


def _parsed(response: Any, count: int) -> list[str] | None:
    """The list in an answer, whatever stands around it."""
    try:
        match = re.search(r"\[.*\]", json_text.parse(response.content)["choices"][0]["message"]["content"], re.DOTALL)
        texts = json_text.parse(match.group()) if match else None
    except (ValueError, KeyError, IndexError, TypeError):
        return None
    whole = isinstance(texts, list) and len(texts) == count and all(isinstance(t, str) and t.strip() for t in texts)
    return [text.strip() for text in texts] if whole and texts else None
