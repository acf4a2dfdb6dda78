"""What every section of a config and every rule's settings have in common."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


def factors(low: float, high: float) -> dict[str, Any]:
    """`json_schema_extra` of a number that `diffalign tune` tries: its value times `low` to `high`, evenly in its logarithm."""
    return {"tune": {"factors": [low, high]}}


def counts(low: int, high: int) -> dict[str, Any]:
    """`json_schema_extra` of a whole number that `diffalign tune` tries: `low` to `high`, its value among them."""
    return {"tune": {"counts": [low, high]}}


class Settings(BaseModel):
    """Frozen; unknown keys, NaN and infinity are errors, and so is a truth value where a number is meant."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic takes true for 1.
        kinds = _leaves(cls.model_fields[str(info.field_name)].annotation)
        if kinds & {int, float} and not kinds & {bool, Any}:
            for leaf in _values(value):
                if isinstance(leaf, bool):
                    raise ValueError("allowed is a number")
        return value


def _leaves(annotation: Any) -> set[Any]:
    inner = get_args(annotation)
    return set().union(*map(_leaves, inner)) if inner else {annotation}


def _values(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for part in value for leaf in _values(part)] if isinstance(value, (list, tuple)) else [value]
