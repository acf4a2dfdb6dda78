"""How far a run goes: in updates, network rows, samples scored, or seconds."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from diffalign.errors import Fault, UserError
from diffalign.runtime import keys
from diffalign.types import Update

if TYPE_CHECKING:
    from diffalign.config import Config


@dataclass(frozen=True)
class Spent:
    """What a run, or an update, took: rows count network rows forward plus twice those backward, reward_calls samples scored, scouts too,
    seconds those of updates: evaluations and samples to look at are not in it."""

    updates: int = 0
    rows: float = 0.0
    reward_calls: int = 0
    seconds: float = 0.0

    @classmethod
    def on(cls, update: Update) -> Spent:
        """What one update took."""
        numbers = update.metrics
        rows = numbers.get("nfe", 0.0) + 2 * numbers.get("nfe_backward", 0.0)
        return cls(1, rows, update.scored + update.unscored + update.scouted, numbers.get("seconds/total", 0.0))

    def __add__(self, other: Spent) -> Spent:
        return Spent(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def row(self) -> dict[str, float]:
        """As it is logged beside an evaluation."""
        return {key: float(getattr(self, kind)) for kind, key in keys.SPENT.items()}


@dataclass(frozen=True)
class Budget:
    """Limits of a run; None: none of that kind.

    An update is begun where what updates took on average so far still fits. So a run whose updates cost the same ends at its last whole
    update within, and any other within about one update of that; and it ends at the same one if it is taken up in between.
    """

    updates: int | None = None
    rows: float | None = None
    reward_calls: int | None = None
    seconds: float | None = None

    @classmethod
    def of(cls, config: Config) -> Budget:
        """That of a run."""
        return cls(config.updates, config.budget.rows, config.budget.reward_calls, config.budget.seconds)

    def allows(self, spent: Spent) -> bool:
        """Whether another update stays within every limit."""
        return spent.updates < self.reach(spent)[0]

    def reach(self, spent: Spent) -> tuple[int, str]:
        """How many updates there will be in all, as far as can be told, and the kind of the limit that ends them."""
        done = spent.updates
        mean = {kind: getattr(spent, kind) / done for kind in self._limits()} if done else {"updates": 1.0}
        totals = {kind: int(limit // mean[kind]) for kind, limit in self._limits().items() if mean.get(kind)}
        kind = min(totals, key=lambda name: totals[name], default="")
        return (totals[kind], kind) if kind else (done + 1, "")

    def share(self, spent: Spent) -> str:
        """How much is spent of the limit that ends the run, where that is not its number of updates."""
        _, kind = self.reach(spent)
        if kind in ("", "updates"):
            return ""
        limit = self._limits()[kind]
        return f"{100 * getattr(spent, kind) / limit:.0f} % of {limit:,.10g} {kind.replace('_', ' ')}"

    def check_first(self, took: Spent) -> None:
        """Refuse to go on where not even the first update was within.

        Raises:
            Fault: which says what it took.
        """
        for kind, limit in self._limits().items():
            if (value := getattr(took, kind)) > limit:
                raise Fault(
                    f"budget.{kind}: got {limit:.10g}, the first update took {value:.10g}; allowed is that or more"
                )

    def check_spent(self, where: Any, spent: Spent) -> None:
        """Refuse to take up a run that went further than this.

        Raises:
            UserError: with the way out.
        """
        for kind, limit in self._limits().items():
            value = getattr(spent, kind)
            # The last update may have taken more than was thought.
            each = value / spent.updates if kind != "updates" and spent.updates else 0.0
            if value - each > limit:
                name = kind if kind == "updates" else f"budget.{kind}"
                raise UserError(
                    f"{name}: got {limit:.10g}, {where} has done {value:.10g}; allowed is {value:.10g} or more, or --fresh"
                )

    def _limits(self) -> dict[str, float]:
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
