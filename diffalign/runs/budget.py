"""How far a run goes: in updates, network rows, samples scored, or seconds."""

from __future__ import annotations

from dataclasses import dataclass, fields

from diffalign.types import Update


@dataclass(frozen=True)
class Spent:
    """What a run, or an update, took: rows count network rows forward plus twice those backward, reward_calls samples scored."""

    updates: int = 0
    rows: float = 0.0
    reward_calls: int = 0
    seconds: float = 0.0

    @classmethod
    def on(cls, update: Update) -> Spent:
        """What one update took."""
        numbers = update.metrics
        rows = numbers.get("nfe", 0.0) + 2 * numbers.get("nfe_backward", 0.0)
        return cls(1, rows, update.scored + update.unscored, numbers.get("seconds/total", 0.0))

    def __add__(self, other: Spent) -> Spent:
        return Spent(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Budget:
    """Limits of a run; None: none of that kind."""

    updates: int | None = None
    rows: float | None = None
    reward_calls: int | None = None
    seconds: float | None = None

    def allows(self, spent: Spent, last: Spent) -> bool:
        """Whether another update that takes what the last one took stays within every limit."""
        next_one = spent + Spent(1, last.rows, last.reward_calls, last.seconds)
        limits = ((getattr(self, f.name), getattr(next_one, f.name)) for f in fields(self))
        return all(limit is None or value <= limit for limit, value in limits)
