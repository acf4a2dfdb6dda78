"""Text in pictures: how near what can be read is to what the prompt asks for. Read by RapidOCR 3 (PP-OCRv6), on the CPU, without downloads.

The target is `text` of the prompt's metadata, or what stands in the first quotation. Spaces and case do not count.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from diffalign.rewards.base import Reward, to_uint8
from diffalign.runtime.extras import PARTS
from diffalign.types import Media, Prompts

REWARDS = {
    "ocr": {
        "object": "OCR",
        "differentiable": False,
        "background": True,
        "modality": "image",
        "shown": "text",
        "about": "1 - edit distance / length of the wanted text, further text costs nothing (Flow-GRPO's rule)",
        "family": "RapidOCR",
        "range": "0 to 1",
        "licence": "Apache-2.0",
        "extra": "rapidocr",
        "known": (1, 0, 0),
        "tolerance": 0.3,
    },
    "ocr_exact": {
        "object": "OCRExact",
        "differentiable": False,
        "background": True,
        "modality": "image",
        "shown": "text",
        "about": "the same, and further text counts as wrong: repeating the text does not pay",
        "family": "RapidOCR",
        "range": "0 to 1",
        "licence": "Apache-2.0",
        "extra": "rapidocr",
        "known": (1, 0, 0),
        "tolerance": 0.3,
    },
}
# A quotation begins after a space or a bracket and ends before one: what follows a digit, as in 6" or 5'10", means inches.
QUOTED = re.compile(
    r"(?<![^\s(\[{\u2014:,-])[\"\u201c]([^\"\u201c\u201d]+)[\"\u201d](?!\w)|\u201c([^\u201c\u201d]+)\u201d"
)


def target(prompt: str, metadata: dict[str, Any]) -> str:
    """What should be written.

    Raises:
        ValueError: if neither metadata nor quotes say it.
    """
    given = metadata.get("text")
    found = QUOTED.search(prompt)
    wanted = plain(given if isinstance(given, str) else (found.group(1) or found.group(2)) if found else "")
    if not wanted:
        raise ValueError(f"the prompt {prompt!r} does not say what to write: quote it, or give `text` in its metadata")
    return wanted


def plain(text: str) -> str:
    """Without spaces and case."""
    return "".join(text.split()).lower()


def distance(a: str, b: str) -> int:
    """Levenshtein's: insertions, deletions and exchanges of letters that make one of the other."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
    return row[-1]


def credit(found: str, wanted: str, exact: bool) -> float:
    """1 - min(d, n) / n for n letters; without `exact`, d is 0 wherever the text is among what was read."""
    near = 0 if not exact and wanted in found else distance(found, wanted)
    return 1 - min(near, len(wanted)) / len(wanted)


class OCR(Reward):
    """Scores (N,) of first frames."""

    exact = False

    def __init__(self) -> None:
        try:
            import onnxruntime  # noqa: F401  # rapidocr asks for it at the first picture only
            from rapidocr import RapidOCR
        except ImportError as error:
            raise ImportError(f"needs rapidocr and onnxruntime: {PARTS['rapidocr'].install}") from error

        self.read = RapidOCR(params={"Global.log_level": "error"})  # a picture without text would be a line of its log

    def __call__(self, media: Media, prompts: Prompts) -> list[float]:
        wanted = [target(text, metadata) for text, metadata in zip(prompts.text, prompts.metadata, strict=True)]
        return [
            credit(self.seen(frames[0]), text, self.exact) for frames, text in zip(to_uint8(media), wanted, strict=True)
        ]

    def seen(self, picture: np.ndarray) -> str:
        """All that can be read in a picture (H, W, 3) uint8, RGB."""
        found = self.read(np.ascontiguousarray(picture[..., ::-1]))  # it expects BGR of an array
        return plain("".join(found.txts or ()))


class OCRExact(OCR):
    """The same where further text counts as wrong."""

    exact = True
