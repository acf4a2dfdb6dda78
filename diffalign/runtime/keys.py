"""Keys of what a run logs about rewards, and of what it spent: `reward/NAME`, `invalid/NAME`, `eval/NAME` and its interval, `spent/KIND`;
made and read here alone.

A reward may have any name. One that would be read as something else stands in quotes: `reward/"total"`, `eval/"x_lo"`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

TOTAL, VALID, COUNT = "reward/total", "reward/valid", "eval/n"
RATE, DIVERSITY, DRIFT = "lr", "pictures/diversity", "pictures/drift"
BLANK, LATENT = "pictures/blank", "latents/rms"
TOOK = "seconds/total"  # of an update
RESET = "reference_reset"  # of an update after which the reference became the present model
# Of scouts: their mean, that of those kept, how far their order is that of the second samples, and how many have no score.
SCOUTED, SCOUTS_KEPT, SCOUTS_RANK, SCOUTS_INVALID = "scouts/mean", "scouts/kept", "scouts/rank", "scouts/invalid"
# Of prompts that get more samples than others: the fewest and the most of an update, and the mean of what was thought of their pass rates.
FEWEST, MOST, PASS_RATE = "allocated/fewest", "allocated/most", "allocated/pass_rate"
# Of samples of the bare base model that a run is anchored by: the matching loss on them, and the base model's own.
DATA, DATA_BASE = "data/loss", "data/base"
SPARED = "cache/spared"  # share of its rollouts' calls of blocks that a cache answered
# What a run had taken up to an evaluation, by kind.
SPENT = {kind: f"spent/{kind}" for kind in ("rows", "reward_calls", "seconds")}
_FIXED = {"total", "valid"}
# Of an evaluation's keys, longer ones first.
ENDINGS = ("_since_best_lo", "_since_best_hi", "_since_best", "_gain_lo", "_gain_hi", "_gain", "_lo", "_hi")


def is_update(row: Iterable[str]) -> bool:
    """Whether a row of `metrics.jsonl` is an update's, and not an evaluation's or a grid's."""
    return not {COUNT, DRIFT}.intersection(row)


def reward(name: str) -> str:
    """Of a reward's mean over an update's samples."""
    return f"reward/{_quoted(name, name in _FIXED)}"


def rewards(keys: Iterable[str]) -> dict[str, str]:
    """Key -> reward, of those among some keys that are rewards' means."""
    means = (key for key in keys if key.startswith("reward/") and key not in (TOTAL, VALID))
    return {key: _unquoted(key.removeprefix("reward/")) for key in means}


def share(name: str) -> str:
    """Of the share that one of several rewards has of an update's advantages."""
    return f"share/{name}"


def multiplier(name: str) -> str:
    """Of a floor's multiplier, as it is for the next update."""
    return f"multiplier/{name}"


def floor_mean(name: str) -> str:
    """Of the running mean of a reward that has a floor."""
    return f"floor_mean/{name}"


def slack(name: str) -> str:
    """Of how far that is above the floor."""
    return f"slack/{name}"


def invalid(name: str) -> str:
    """Of how many of an update's samples a reward gave no score."""
    return f"invalid/{name}"


def invalids(keys: Iterable[str]) -> list[str]:
    """Rewards among some keys that gave samples no score."""
    return [key.removeprefix("invalid/") for key in keys if key.startswith("invalid/")]


def evaluated(name: str, ending: str = "") -> str:
    """Of a reward's mean over an evaluation's samples, or with an ending of its interval, its gain and that one's interval."""
    return f"eval/{_quoted(name, name == 'n' or name.endswith(ENDINGS))}{ending}"


def evaluation(key: str) -> tuple[str, str] | None:
    """Reward and ending of an evaluation's key; None for other keys."""
    if not key.startswith("eval/") or key == COUNT:
        return None
    text = key.removeprefix("eval/")
    ending = next((end for end in ENDINGS if text.endswith(end)), "")
    return _unquoted(text.removesuffix(ending)), ending


def _quoted(name: str, mistakable: bool) -> str:
    return json.dumps(name) if mistakable or name.startswith('"') else name


def _unquoted(text: str) -> str:
    return json.loads(text) if text.startswith('"') else text
