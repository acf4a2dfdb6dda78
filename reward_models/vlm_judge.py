"""A vision-language model as judge, behind any OpenAI-compatible endpoint: `vlm_judge@http://127.0.0.1:8000/v1#MODEL`.

It is asked one yes-no question a sample; the score is P(yes) / (P(yes) + P(no)) from the probabilities of its first token. Endpoints that
give none are read as yes (1) or no (0), which leaves a group without spread more often. What is neither has no score.
"""

from __future__ import annotations

import base64
import io
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from diffalign.rewards.base import to_uint8
from diffalign.rewards.remote import Patient, openai_key
from diffalign.types import Fault, Media, Prompts

REWARDS = {
    "vlm_judge": {
        "object": "VLMJudge",
        "differentiable": False,
        "background": True,
        "modality": "any",
        "about": "P(yes) of a vision-language model asked whether the picture, or the video's frames, show the prompt",
        "range": "0 to 1",
        "weights": "an OpenAI-compatible endpoint",
        "licence": "the model's",
    }
}
QUESTION = 'Does this image show exactly what the prompt "{prompt}" asks for, with nothing wrong? Answer with one word, Yes or No.'
FRAMES = 4  # of a video that are shown
AT_ONCE = 8  # requests on their way


class VLMJudge:
    """Scores (N,), NaN where the judge gave no answer in time or none that is yes or no."""

    def __init__(self, place: str | None = None, deadline: float = 120.0) -> None:
        address, _, self.model = (place or "").partition("#")
        if not address.startswith(("http://", "https://")) or not self.model:
            raise ValueError(f"got {place!r}; allowed is vlm_judge@http://HOST:PORT/v1#MODEL")
        self.url = f"{address.rstrip('/')}/chat/completions"
        self._client = Patient("vlm_judge", openai_key(), deadline)

    @property
    def said(self) -> str:
        """Why the last request failed."""
        return self._client.said

    def __call__(self, media: Media, prompts: Prompts) -> list[float]:
        shown = to_uint8(media)
        chosen = np.unique(np.linspace(0, shown.shape[1] - 1, min(FRAMES, shown.shape[1])).round().astype(int))
        self._client.begin()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            answers = list(pool.map(self._ask, shown[:, chosen], prompts.text))
        self._client.end(any(answer is not None for answer in answers))
        return [float("nan") if answer is None else probability(answer) for answer in answers]

    def _ask(self, frames: np.ndarray, prompt: str) -> Any:
        pictures = [{"type": "image_url", "image_url": {"url": _data(frame)}} for frame in frames]
        content = [*pictures, {"type": "text", "text": QUESTION.format(prompt=prompt)}]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": 20,
        }
        return self._client.post(lambda: self.url, body)


def _data(frame: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def probability(answer: Any) -> float:
    """P(yes) / (P(yes) + P(no)) of an answer; NaN if it says neither.

    Raises:
        Fault: if it is no answer of such an endpoint.
    """
    try:
        choice = answer["choices"][0]
        text = str(choice["message"]["content"] or "")
        first = ((choice.get("logprobs") or {}).get("content") or [{}])[0]
        likely = {token["token"]: float(token["logprob"]) for token in first.get("top_logprobs") or ()}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise Fault(f"reward vlm_judge: {str(answer)[:200]!r} is no chat completion") from error
    yes, no = (sum(math.exp(v) for token, v in likely.items() if _word(token) == word) for word in ("yes", "no"))
    if yes + no > 0:
        return yes / (yes + no)
    return {"yes": 1.0, "no": 0.0}.get(_word(text), math.nan)


def _word(token: str) -> str:
    return token.strip().strip(".,!\"'").lower()
