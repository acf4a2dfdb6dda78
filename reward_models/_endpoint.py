"""A model behind an OpenAI-compatible endpoint: which models it has, and one question about pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffalign.errors import Fault, UserError, shortened
from diffalign.runtime.http import LATER, Patient

NAMED = 12  # models that a message lists


class Endpoint:
    """name: of the reward, for messages; address: such as http://127.0.0.1:8000/v1; client: whoever uses it says when its calls begin."""

    def __init__(self, name: str, address: str, model: str, client: Patient) -> None:
        self.name, self.model, self._client = name, model, client
        self._address = address.rstrip("/")

    def greet(self, say: Callable[[str], None]) -> None:
        """Wait until the endpoint answers, and find out whether it has the model.

        Raises:
            UserError: for a wrong address or key, or a model that it does not list.
            Fault: if nobody answers in time.
        """
        place, status, listed = f"{self._address}/models", 0, None

        def there() -> bool:
            nonlocal status, listed
            status, listed = self._client.get(place)
            return status != 0 and status not in LATER

        if not self._client.wait(there, self._address, say):
            raise Fault(f"reward {self.name}: no server answers ({self._client.said})")
        if status == 401:
            raise UserError(f"rewards: {self.name}: {place} wants another key (401); set OPENAI_API_KEY")
        names = _names(listed) if status == 200 else None
        if names is None:
            say(f"{self.name}: {place} lists no models ({status}), so {shortened(self.model)} is taken as it is")
        elif self.model not in names:
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            there_are = ", ".join(map(shortened, names[:NAMED])) or "none"
            raise UserError(f"rewards: {self.name}: got the model {self.model!r}, {place} lists {there_are}{more}")

    def ask(self, frames: NDArray[np.uint8], question: str, length: int) -> Any:
        """The chat completion (at most `length` tokens) of a question about pictures (F, H, W, 3); None if there was none in time.

        Raises:
            Fault: if the endpoint refuses it.
        """
        pictures = [{"type": "image_url", "image_url": {"url": _data(frame)}} for frame in frames]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": [*pictures, {"type": "text", "text": question}]}],
            "max_tokens": length,
            "temperature": 0,  # servers draw by the model's own settings unless told
            "seed": 0,
            "logprobs": True,
            "top_logprobs": 20,
        }
        return self._client.post(lambda: f"{self._address}/chat/completions", body)


def _data(frame: NDArray[np.uint8]) -> str:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _names(listed: Any) -> list[str] | None:
    """Of a list of models as such endpoints give it; None if it is none. Some write models/NAME for what is asked for as NAME."""
    if not isinstance(listed, dict) or not isinstance(listed.get("data"), list):
        return None
    ids = [entry["id"] for entry in listed["data"] if isinstance(entry, dict) and isinstance(entry.get("id"), str)]
    return list(dict.fromkeys([*ids, *(name.removeprefix("models/") for name in ids)]))
