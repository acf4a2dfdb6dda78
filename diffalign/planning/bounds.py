"""What an update's time is held against: a card's peak, or what this machine does."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from diffalign.config import Config
from diffalign.planning.cards import Card
from diffalign.shapes import models

# How many times the bound by a card's data sheet networks took on the one card that was measured, an H200: the least and the most of
# SDXL and FLUX.1 (in nf4) in sampling and training, calls recorded and not; tests hold it against benchmarks/results/on_a_card.json.
RECORDED, EAGER = (2.9, 4.8), (3.0, 10.4)


@dataclass(frozen=True)
class Bound:
    """A rate of products, FLOP/s, and on what, in words; measured: how many times its time was taken elsewhere, None: not known."""

    rate: float
    where: str
    measured: tuple[float, float] | None = None


def bound(config: Config, card: Card | None) -> Bound | None:
    """What to hold an update's time against: a named card's peak; or what this machine does, if the model could run on it."""
    if card is not None:
        if card.rate is None:
            return None
        return Bound(card.rate, f"a {card.name} ({big(card.rate)}FLOP/s by its data sheet)", _measured(config))
    if not models.path(config.model) and not torch.cuda.is_available():
        return None
    rate = matrix_rate()
    return Bound(rate, f"this machine ({big(rate)}FLOP/s, a 1024 x 1024 product measured now)")


def _measured(config: Config) -> tuple[float, float] | None:
    if models.path(config.model) or config.memory.quantize == "int8":  # small networks, other products: not measured
        return None
    return EAGER if config.speed == "eager" else RECORDED


def big(value: float) -> str:
    """A number with G, T or P."""
    unit, sign = next(((u, s) for u, s in ((1e15, "P"), (1e12, "T")) if value >= u), (1e9, "G"))
    return f"{value / unit:.1f} {sign}"


def matrix_rate(size: int = 1024, seconds: float = 0.5) -> float:
    """FLOP/s of a float32 matrix product on this machine's default device."""
    a = torch.randn(size, size, device="cuda" if torch.cuda.is_available() else "cpu")
    a @ a
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        float((a @ a)[0, 0])
        done += 1
    return done * 2 * size**3 / (time.perf_counter() - started)
