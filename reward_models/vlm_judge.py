"""Vision-language models as judges, behind any OpenAI-compatible endpoint: `vlm_judge@http://127.0.0.1:8000/v1#MODEL`.

`vlm_judge` asks one yes-no question a sample; the score is P(yes) / (P(yes) + P(no)) from the probabilities of its first token. Endpoints
that give none are read as yes (1) or no (0), which leaves a group without spread more often. `vlm_points` asks for points from 1 to 5, as
UnifiedReward and models like it give them; a whole number is replaced by its mean over the probabilities. Lines for several axes, as
UnifiedReward 2.0 writes them ("Alignment Score (1-5): 3.2"), give their mean. What is neither, an answer that was cut, and one whose listed
probabilities leave out more than 0.05, has no score. A question of one's own, with {prompt} where the prompt goes, is a file:
`#MODEL;FILE`.
"""

from __future__ import annotations

import json
import math
import re
from abc import abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from diffalign.errors import Fault, UserError
from diffalign.rewards.base import Reward, to_uint8
from diffalign.runtime.http import Patient, openai_key
from diffalign.types import Media, Prompts
from reward_models._endpoint import Endpoint

REWARDS = {
    "vlm_judge": {
        "object": "VLMJudge",
        "differentiable": False,
        "background": True,
        "modality": "any",
        "about": "P(yes) of a vision-language model asked whether the picture, or the video's frames, show the prompt",
        "family": "zero-shot VLM",
        "range": "0 to 1",
        "weights": "an OpenAI-compatible endpoint",
        "licence": "the model's",
    },
    "vlm_points": {
        "object": "VLMPoints",
        "differentiable": False,
        "background": True,
        "modality": "any",
        "about": "points from 1 to 5 of a vision-language model, divided by 5",
        "family": "zero-shot VLM",
        "range": "0.2 to 1",
        "weights": "an OpenAI-compatible endpoint",
        "licence": "the model's",
    },
}
QUESTION = 'Does this image show exactly what the prompt "{prompt}" asks for, with nothing wrong? Answer with one word, Yes or No.'
POINTS = (
    'How well does this image show what the prompt "{prompt}" asks for, and how good is it to look at? Give points from 1 (bad) to 5 '
    '(excellent). End with a line "Final Score: " and the points.'
)
# "Final Score: 4", "**Style Score (1-5):** 3.2", '"score": 4': a name, perhaps the range in brackets, then a colon or at once a number
GIVEN = re.compile(
    r"(?P<axis>\w*)[ _]?score[\"'*_ ]*(?:\([^)\n]*\))?[\"'*_ ]*(?:[:=]|(?=\d))[\"'*_ ]*(?P<number>\d+(?:\.\d+)?)?(?=(?P<rest>[^\n]*))",
    re.IGNORECASE,
)
ALONE = re.compile(r"\s*(?P<number>\d+(?:\.\d+)?)(?P<rest>\W*)")
MORE = re.compile(
    r"\s*(?:\([^)]*\)\s*)?(?:-|\u2013|to\b)\s*\d|\s*(?:/|out of)\s*(?!5\b)\d|[\w.]*\w"
)  # a range, another scale, "4th"
AXES = 3  # lines that are an answer by axes
LEAST, MOST = 1.0, 5.0
OUTSIDE = 0.05  # probability that the listed tokens may leave out
MOST_LIKELY = 1.01  # of all tokens together, but for rounding
FRAMES = 4  # of a video that are shown
AT_ONCE = 8  # requests on their way
SIDE, RED, BLUE, SHOWN = 64, (220, 20, 20), (20, 20, 220), "a plain red picture"  # what a greeting asks about


class _Asked(Reward):
    """Asks about every sample; NaN where there was no answer in time or none that is a score."""

    name: ClassVar[str]
    question: ClassVar[str]
    length: ClassVar[int]  # tokens of an answer

    def __init__(self, place: str | None = None, deadline: float = 120.0) -> None:
        address, _, rest = (place or "").partition("#")
        self.model, _, file = rest.partition(";")
        if not address.startswith(("http://", "https://")) or not self.model:
            raise ValueError(f"got {place!r}; allowed is {self.name}@http://HOST:PORT/v1#MODEL or #MODEL;FILE")
        self.asked = Path(file).read_text(encoding="utf-8") if file else self.question
        if "{prompt}" not in self.asked:
            raise ValueError(f"{file} does not say where the prompt goes; allowed is a text with {{prompt}} in it")
        self.unread = ""
        self._client = Patient(openai_key(), deadline)
        self._endpoint = Endpoint(f"{self.name}@{address}#{self.model}", address, self.model, self._client)

    @property
    def said(self) -> str:
        """Why the last request failed, or what was answered that is no score."""
        return self._client.said or self.unread

    def greet(self, say: Callable[[str], None] = print) -> None:
        """Ask the endpoint for its models, then about a red picture and a blue one: whether they are red. See `Reward.greet`.

        Raises:
            UserError: for a wrong address, key or model, and one that takes no picture or answers nothing that is a score.
            Fault: if nobody answers in time.
        """
        self._endpoint.greet(say)
        who = self._endpoint.name
        self._client.begin()
        try:
            answers = [self._ask(np.full((1, SIDE, SIDE, 3), colour, np.uint8), SHOWN) for colour in (RED, BLUE)]
            scores = [math.nan if answer is None else self.read(answer) for answer in answers]
        except Fault as error:
            raise UserError(
                f"rewards: {who}: a question about a picture failed: {error}; allowed is a model that takes pictures, and a key that it "
                "wants is OPENAI_API_KEY's"
            ) from error
        if None in answers:
            raise Fault(f"reward {who}: no answer to a question about a picture ({self._client.said})")
        if all(map(math.isnan, scores)):
            raise UserError(
                f"rewards: {who}: answered {_said(answers[0])[0][:80]!r}, which is no score; allowed is a model that answers at once"
            )
        if scores[0] == scores[1]:
            say(
                f"{who}: gives {scores[0]:.3g} to a red picture and to a blue one, asked for {SHOWN}; does it see them?"
            )

    def __call__(self, media: Media, prompts: Prompts) -> list[float]:
        shown = to_uint8(media)
        chosen = np.unique(np.linspace(0, shown.shape[1] - 1, min(FRAMES, shown.shape[1])).round().astype(int))
        self._client.begin()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            answers = list(pool.map(self._ask, shown[:, chosen], prompts.text))
        self._client.end(any(answer is not None for answer in answers))
        found = [float("nan") if answer is None else self.read(answer) for answer in answers]
        strange = [
            answer for answer, score in zip(answers, found, strict=True) if answer is not None and math.isnan(score)
        ]
        if strange:
            self.unread = f"answered {_said(strange[0])[0][:80]!r}, which is no score"
        return found

    def _ask(self, frames: np.ndarray, prompt: str) -> Any:
        return self._endpoint.ask(frames, self.asked.replace("{prompt}", prompt), self.length)

    @abstractmethod
    def read(self, answer: Any) -> float:
        """The score in an answer."""


class VLMJudge(_Asked):
    """Scores (N,) of yes-no questions."""

    name, question, length = "vlm_judge", QUESTION, 1

    def read(self, answer: Any) -> float:
        return probability(answer)


class VLMPoints(_Asked):
    """Scores (N,) of questions for points."""

    name, question, length = "vlm_points", POINTS, 512

    def read(self, answer: Any) -> float:
        return points(answer) / MOST


def _said(answer: Any) -> tuple[str, list[dict[str, Any]]]:
    """An answer's text, and its tokens with their probabilities, none where the endpoint gives none.

    Raises:
        Fault: if it is no answer of such an endpoint.
    """
    try:
        choice = answer["choices"][0]
        tokens = list((choice.get("logprobs") or {}).get("content") or [])
        return str(choice["message"]["content"] or ""), tokens
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise Fault(f"{str(answer)[:200]!r} is no chat completion") from error


def _likely(token: Any) -> dict[str, float]:
    """Probabilities of what could have stood in a token's place."""
    try:
        return {other["token"]: math.exp(float(other["logprob"])) for other in token.get("top_logprobs") or ()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Fault(f"{str(token)[:200]!r} is no token of a chat completion") from error


def _left_out(likely: dict[str, float]) -> bool:
    """Whether the listed tokens leave out more than may be: what was listed is then no picture of what could have been said.

    Raises:
        Fault: if they add up to more than 1.
    """
    # Where one token is listed under several spellings, each has the same probability to the last bit: it counts once.
    total = sum(p for _, p in {(_word(token), p) for token, p in likely.items()})
    if total > MOST_LIKELY:
        raise Fault(f"{str(likely)[:200]}: probabilities of an answer's first token add up to more than 1")
    return total < 1 - OUTSIDE


def probability(answer: Any) -> float:
    """P(yes) / (P(yes) + P(no)) of an answer; NaN if it says neither, or lists too little of what it could have said.

    Raises:
        Fault: if it is no answer of such an endpoint.
    """
    text, tokens = _said(answer)
    likely = _likely(tokens[0]) if tokens else {}
    if not likely:
        return {"yes": 1.0, "no": 0.0}.get(_word(text), math.nan)
    if _left_out(likely):
        return math.nan
    spelt = {(_word(token), p) for token, p in likely.items()}
    yes, no = (sum(p for token, p in spelt if token == word) for word in ("yes", "no"))
    return yes / (yes + no) if yes + no > 0 else math.nan


def points(answer: Any) -> float:
    """The points that an answer gives at its end, or the mean of its axes' points, in [1, 5]; NaN if it gives none or was cut.

    Raises:
        Fault: if it is no answer of such an endpoint.
    """
    text, tokens = _said(answer)
    if answer["choices"][0].get("finish_reason") == "length" or _broken(text):
        return math.nan
    found = list(GIVEN.finditer(text)) or [*filter(None, [ALONE.fullmatch(text)])]
    by_axis = {axis: line for line in found if (axis := line.groupdict().get("axis", "").strip("_").lower())}
    if len(by_axis) >= AXES and "final" not in by_axis:
        return sum(_number(line, tokens) for line in by_axis.values()) / len(by_axis)
    final = [by_axis["final"]] if "final" in by_axis else found[-1:]
    return _number(final[0], tokens) if final else math.nan


def _broken(text: str) -> bool:
    """Whether an answer begins as JSON and is none."""
    inner = text.strip().removeprefix("```json").removesuffix("```").strip()
    if not inner.startswith("{"):
        return False
    try:
        json.loads(inner)
    except ValueError:
        return True
    return False


def _number(line: re.Match[str], tokens: list[dict[str, Any]]) -> float:
    """The points of a line; NaN for none, for a range such as the question's own, and for what is not in [1, 5]."""
    if line["number"] is None or MORE.match(line["rest"]):
        return math.nan
    given = float(line["number"])
    if "." not in line["number"]:
        end = 0
        for token in tokens:
            end += len(token.get("token", ""))
            if end >= line.end("number"):  # the token that is the number
                given = _mean_points(_likely(token), given)
                break
    return given if LEAST <= given <= MOST else math.nan


def _mean_points(likely: dict[str, float], given: float) -> float:
    """sum k P(k) / sum P(k) over the whole points that could have been given; what was given where no probabilities are listed, NaN where
    they leave out too much."""
    if likely and _left_out(likely):
        return math.nan
    numbers = [(float(word), p) for word, p in likely.items() if word.strip() in set("12345")]
    total = sum(p for _, p in numbers)
    return sum(k * p for k, p in numbers) / total if total > 0 else given


def _word(token: str) -> str:
    return token.strip().strip(".,!\"'").lower()
