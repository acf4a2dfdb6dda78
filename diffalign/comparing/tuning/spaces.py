"""What is tried of a config: the ranges that its settings declare beside themselves, as far as the config allows them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from diffalign import config as configs
from diffalign.config import Config
from diffalign.errors import UserError


@dataclass(frozen=True)
class Range:
    """A key, and from where to where it is tried. start: the config's own value, which is tried first; whole: whole numbers, evenly; else
    any, evenly in their logarithm; factors: what the config's value is multiplied by, as it was declared."""

    key: str
    low: float
    high: float
    start: float
    whole: bool = False
    factors: tuple[float, float] | None = None

    def value(self, drawn: float) -> float:
        """What was drawn as a config has it: three digits, within the range."""
        return int(drawn) if self.whole else min(max(float(f"{drawn:.3g}"), self.low), self.high)


def ranges(config: Config, fits: Callable[[str, float], bool]) -> list[Range]:
    """Of the keys of a config and of its rule that declare a range, those that do something there.

    fits: whether the config may have a value at a key, all else as it is: ends that it may not have are moved towards its own value.
    """
    found = []
    for key, own, said in _declared(config):
        if "factors" in said and type(own) in (int, float) and own > 0:
            low, high = (own * factor for factor in said["factors"])
            low, high = (end if fits(key, end) else own for end in (low, high))
            found.append(Range(key, low, high, own, factors=tuple(said["factors"])))
        elif "counts" in said and type(own) is int:
            low, high = min(said["counts"][0], own), max(said["counts"][1], own)
            low = next(value for value in range(low, own + 1) if value == own or fits(key, value))
            high = next(value for value in range(high, own - 1, -1) if value == own or fits(key, value))
            found.append(Range(key, low, high, own, whole=True))
    return [each for each in found if each.low < each.high]


def declared(settings: Any) -> dict[str, dict[str, Any]]:
    """What the keys of a section's class or a rule's declare, as `runtime.settings` lets them."""
    extras = {key: field.json_schema_extra for key, field in settings.model_fields.items()}
    return {key: extra["tune"] for key, extra in extras.items() if isinstance(extra, dict) and "tune" in extra}


def _declared(config: Config) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Key, value and declaration, sections in the schema's order, the rule's settings last."""
    rule = config.make_rule()
    sections: dict[str, Any] = {
        name: section for name in Config.model_fields if hasattr(section := getattr(config, name), "model_fields_set")
    }
    for name, settings in {**sections, "rule": rule.settings}.items():
        for key, found in declared(type(settings)).items():
            idle = f"{name}.{key}" == "sampler.noise_level" and not rule.needs.stochastic_sampler
            if not idle and not (name == "rule" and key in rule.settings.unused()):
                yield f"{name}.{key}", getattr(settings, key), found


def checker(config_file: str, overrides: list[str]) -> Callable[[str, float], bool]:
    """What says whether a config's file with some overrides may have a value at a key."""

    def fits(key: str, value: float) -> bool:
        try:
            configs.load(config_file, [*overrides, f"{key}={value!r}"])
        except UserError:
            return False
        return True

    return fits
