"""Soft-TIFA (GenEval 2, arXiv 2512.16853): probabilities of right answers to questions about a picture, and their means.

Atoms (objects, counts, ...) are estimated by arithmetic means over questions, whole prompts by the geometric mean of their own: one wrong
answer fails a prompt.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")  # that may be said in digits
SCALE = 100  # of published tables


def spellings(answer: str) -> tuple[str, ...]:
    """How an answer may begin: as it is, small, with a capital, in digits where it is a number; each with a space before it too."""
    plain = answer.strip()
    forms = [plain, plain.lower(), plain.capitalize()]
    if plain.lower() in NUMBERS:
        forms.append(str(NUMBERS.index(plain.lower()) + 1))
    return tuple(dict.fromkeys(f"{space}{form}" for space in ("", " ") for form in forms))


def means(log_p: Tensor, picture: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Geometric and arithmetic mean (count,) of each picture's questions, NaN for a picture without one.

    Args:
        log_p: (Q,) logarithms of the probabilities of right answers; NaN makes its picture NaN, no question is left out.
        picture: (Q,) which picture each is about, in [0, count).
        count: of pictures.

    Taken from logarithms, so that the gradient of a geometric mean is finite however small a probability is.
    """
    asked = torch.zeros(count, dtype=log_p.dtype, device=log_p.device).index_add(0, picture, torch.ones_like(log_p))
    # 0 / 0 is the NaN of a picture without questions
    geometric = (torch.zeros_like(asked).index_add(0, picture, log_p) / asked).exp()
    arithmetic = torch.zeros_like(asked).index_add(0, picture, log_p.exp()) / asked
    return geometric, arithmetic


@dataclass(frozen=True)
class Answered:
    """One picture: p (Q,) probabilities of the right answers, NaN where there was none; skills (Q,) what each question asks for; atoms: how
    many things its prompt asks for."""

    p: Sequence[float]
    skills: Sequence[str]
    atoms: int


@dataclass(frozen=True)
class Summary:
    """Means times 100. geometric, arithmetic: over pictures of the mean of each one's questions; skills: arithmetic, over questions; atoms:
    geometric, over pictures; pictures: how many have all answers; unscored: how many have not, and are in none of the means."""

    geometric: float
    arithmetic: float
    skills: dict[str, float]
    atoms: dict[int, float]
    pictures: int
    unscored: int


def summary(answered: Sequence[Answered]) -> Summary:
    """The table of a benchmark; NaN for a mean of nothing.

    Raises:
        ValueError: if a picture has not one skill a question.
    """
    by_skill, by_atoms = defaultdict(list), defaultdict(list)
    geometric, arithmetic = [], []
    for one in answered:
        if len(one.p) != len(one.skills):
            raise ValueError(f"got {len(one.p)} answers and {len(one.skills)} skills; allowed is one skill a question")
        if not one.p or any(math.isnan(p) for p in one.p):
            continue
        geometric.append(math.prod(one.p) ** (1 / len(one.p)))
        arithmetic.append(sum(one.p) / len(one.p))
        by_atoms[one.atoms].append(geometric[-1])
        for skill, p in zip(one.skills, one.p, strict=True):
            by_skill[skill].append(p)
    return Summary(
        _mean(geometric),
        _mean(arithmetic),
        {skill: _mean(values) for skill, values in sorted(by_skill.items())},
        {atoms: _mean(values) for atoms, values in sorted(by_atoms.items())},
        len(geometric),
        len(answered) - len(geometric),
    )


def _mean(values: Sequence[float]) -> float:
    return SCALE * math.fsum(values) / len(values) if values else math.nan
