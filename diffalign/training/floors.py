"""What a rule's floors, and the gate of its divergence, make of an update's scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from diffalign.rules import Rule
from diffalign.runtime import keys
from diffalign.types import Update


def moved(rule: Rule, update: Update, where: str, notify: Callable[[str], None]) -> Update:
    """The update with what its scores did to the rule's floors and gate; a floor that does not hold at its cap is said once."""
    values = update.values if update.judged is None else update.judged[1].by_name
    metrics = {} if update.judged is None else rule.move_gate(update.judged[1], update.judged[0].group)
    for name in rule.move_floors(values):
        said = (
            f"{where}: rule.floors: {name} has stayed below {rule.least[name]:g} with its multiplier at rule.floor_cap"
        )
        notify(f"{said}; lower the floor, raise rule.floor_cap, or lower other weights")
    for name, least in rule.least.items():
        floor = rule.floors[name]
        metrics[keys.multiplier(name)] = floor.multiplier
        if floor.mean is not None:
            metrics |= {keys.floor_mean(name): floor.mean, keys.slack(name): floor.mean - least}
    return replace(update, metrics={**update.metrics, **metrics})
