"""What the settings of every rule have in common."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A rule's settings: the keys of `rule:` in a config besides `name`. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def idle(self, names: Iterable[str], without: str) -> list[str]:
        """A problem for every key that was changed though nothing uses it."""
        changed = [name for name in names if getattr(self, name) != type(self).model_fields[name].default]
        return [f"rule.{name}: got {getattr(self, name)}, has no effect without {without}" for name in changed]
