"""Whether a run may be taken up with other settings than it had, and what follows from them. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffalign import config as configs
from diffalign.errors import UserError

WAY_OUT = "choose another run_dir, or --fresh to start over"
# What an evaluation's numbers depend on besides the weights that are trained: after a change of these they are compared with none before.
JUDGED = (
    *("model", "revision", "weights", "precision", "memory.quantize", "memory.decode"),
    *("content of model", "content of weights", "content of rewards.", "content of lora.frozen"),
)

# Keys whose `auto` is decided when a run begins, and written into its config.
DECIDED = ("attention", "optimizer.micro_batch")
READ = ("prompts.", "evaluation.", "sampler.")  # what a config's prompts are read by


@dataclass(frozen=True)
class Taken:
    """A run that is taken up. kept: its own values of keys that neither it nor the user named, where this version has another default;
    changes: what the user changed, as lines."""

    kept: dict[str, Any] = field(default_factory=dict)
    changes: tuple[str, ...] = ()


def take_up(where: str, old: dict[str, Any], named: Iterable[str], config: configs.Config, change: bool) -> Taken:
    """Hold a config against the settings of the run at `where`.

    old, named: the run's settings and those of them that its user named; change: whether what may change on request may.

    Raises:
        UserError: with every setting that may not differ.
    """
    differ = configs.differences(configs.completed(old), configs.settings(config))
    before, now = set(named), set(configs.given(config))
    # What `auto` became stays, and so do defaults of another version: the run goes on with what it began with.
    decided = {key: was for key, (was, new) in differ.items() if key in DECIDED and new == "auto"}
    # Of a section that is there or not, users name keys.
    chosen = {key for key in differ if any(configs.within(name, [key]) for name in before | now)}
    kept = {key: was for key, (was, _) in differ.items() if key not in chosen and configs.mark(key) != "free"}
    kept |= decided
    left = {key: pair for key, pair in differ.items() if key not in kept}
    bad: dict[str, list[str]] = {"held": [], "on request": [], "free": []}
    for key, (was, new) in left.items():
        bad[configs.mark(key)].append(f"{key}: {was!r} -> {new!r}")
    refused = bad["held"] + ([] if change else bad["on request"])
    if refused:
        lines = [f"run_dir: {where} holds a run with other settings; {WAY_OUT}"]
        if bad["on request"] and not bad["held"]:
            lines = [f"run_dir: {where} holds a run with other settings; --change goes on with these, or {WAY_OUT}"]
        raise UserError(*lines, *(f"  {line}" for line in refused))
    changes = tuple(line for key, (was, new) in left.items() if (line := f"{key}: {was!r} -> {new!r}"))
    return Taken(kept, changes)


def with_kept(config: configs.Config, kept: Mapping[str, Any]) -> configs.Config:
    """A config with some keys at other values, checked again; its prompts are read again if they may be others."""
    settings = configs.settings(config)
    if all(configs.at(settings, key) == value for key, value in kept.items()):
        return config
    raw = config.model_dump(mode="json", exclude_unset=True)
    book = None if any(key.startswith(READ) for key in kept) else config.book
    for key, value in kept.items():
        configs.put(raw, key, value)
    return configs.validate(raw, book=book, decided=config.decided_besides(kept))


def check_digests(where: str, old: Mapping[str, str], new: Mapping[str, str], change: bool) -> list[str]:
    """What differs between the digests of what a run began with and those of what is there now, as lines.

    Raises:
        UserError: if something does, and `change` was not asked for.
    """
    # What an earlier version did not write down cannot differ.
    lines = [
        f"content of {name}: {old[name][:12] or 'none'} -> {new[name][:12] or 'none'}"
        for name in new
        if name in old and old[name] != new[name]
    ]
    if lines and not change:
        problem = f"run_dir: the run in {where} began with other content; restore it, --change goes on with this, or {WAY_OUT}"
        raise UserError(problem, *(f"  {line}" for line in lines))
    return lines


def judged_since(history: Iterable[Mapping[str, Any]]) -> int:
    """The last update after which evaluations began to measure something else than before; 0 if they never did."""
    turns = [entry["update"] for entry in history if any(line.startswith(JUDGED) for line in entry["changes"])]
    return max(turns, default=0)
