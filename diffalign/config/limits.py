"""The keys of a config that say what ends its run. Data only."""

from __future__ import annotations

from pydantic import ConfigDict, Field

from diffalign.config.kinds import FREE
from diffalign.runtime.settings import Settings


class BudgetConfig(Settings):
    """How far it trains besides `updates`: to the last whole update that is within all of them."""

    model_config = ConfigDict(json_schema_extra=FREE)

    rows: float | None = Field(
        None, gt=0, description="of the network: forward, and twice those backward; null: no such limit"
    )
    reward_calls: int | None = Field(None, ge=1, description="samples scored in training; null: no such limit")
    seconds: float | None = Field(
        None, gt=0, description="of updates; evaluations are not counted; null: no such limit"
    )


class GuardConfig(Settings):
    """Alarms, which are always told: what they do besides."""

    model_config = ConfigDict(json_schema_extra=FREE)

    stop: bool = Field(False, description="an alarm ends the run, which is evaluated and saved as at its end")
    patience: int = Field(
        2,
        ge=1,
        le=1000,
        description="evaluations in a row with a held-out reward below its best, the last by more than chance",
    )
    last: int = Field(5, ge=1, le=1000, description="updates over which an alarm averages what it looks at")
