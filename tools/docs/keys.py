"""Every key of a config, for docs/config.md."""

from __future__ import annotations

from itertools import groupby

from diffalign.config import legend
from diffalign.config.marks import mark
from diffalign.config.schema import Config
from tools.docs.markdown import table

HEAD = ("key", "what it is", "allowed", "default", "when a run goes on")


def _row(key: legend.Key, name: str) -> tuple[str, ...]:
    default = "must be given" if key.default is legend.NONE else f"`{legend.written(key.default)}`"
    return f"`{name}`", key.what, key.allowed, default, mark(key.name)


def sections() -> list[str]:
    """A table for the keys of the file itself, and one for each section."""
    lines = []
    found = [key for key in legend.every() if not key.name.startswith("rule.")]
    alone = [key for key in found if "." not in key.name]
    lines += ["### The file itself", "", *table(HEAD, (_row(key, key.name) for key in alone)), ""]
    for section, keys in groupby((key for key in found if "." in key.name), lambda key: key.name.partition(".")[0]):
        about = (Config.model_fields[section].annotation.__doc__ or "").split("\n")[0]  # type: ignore[union-attr]
        rows = (_row(key, key.name.partition(".")[2]) for key in keys)
        lines += [f"### {section}", "", about, "", *table(HEAD, rows), ""]
    return lines[:-1]


def of_rule(name: str) -> list[str]:
    """The settings of a rule."""
    return table(HEAD[:-1], (_row(key, key.name.removeprefix("rule."))[:-1] for key in legend.rule_keys(name)))
