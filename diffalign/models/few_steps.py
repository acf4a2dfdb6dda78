"""Whether a model was distilled to few steps, by what its name and its files say. Needs no torch.

What its network does is measured when a run begins (`diffalign.rules.own_walk`); this is for before, and for where nothing can be measured.
"""

from __future__ import annotations

import re
from typing import Any

STEPS = 8  # network calls a sample: a model that is used with at most so many may be distilled
USUAL = 4  # calls of a distilled model that nothing more is known of
GUIDANCE = 1.0  # of such a one: it is built in

# Parts of a model's name, as authors give them, alone or before a number (`dmd2`); `base` beside them says: not this one.
WORDS = (
    "turbo",
    "lightning",
    "schnell",
    "klein",
    "lcm",
    "hyper",
    "distil",
    "distill",
    "distilled",
    "dmd",
    "tcd",
    "pcm",
)
# Schedulers that are made for distilled networks alone, and settings that no other has: a table of the timesteps to use.
SCHEDULERS = ("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler", "CMStochasticIterativeScheduler")
TABLES = ("timesteps", "denoising_step_list", "timestep_list")
LAST = 0.1  # sigma: a scheduler that keeps its last call above it leaves the network a large last step

ADVICE = (
    "noise drawn anew draws it to a mean, which may blur it; use nft with rule.states: own; rule.levels: [0, 2], of a flow with "
    "first_level: true, times: 2, else with times: 1; or, of a flow, flow_grpo with sampler: {process: cps, noise_level: 0.9}, "
    "rule.window: [0, 2]"
)


def by_name(model: str) -> str:
    """What a hub id or a folder's name says: `its name (turbo)`; empty if nothing."""
    name = model.rstrip("/").rpartition("/")[2].lower()
    parts = [part.rstrip("0123456789") for part in re.split(r"[^a-z0-9]+", name)]
    if "base" in parts:
        return ""
    counted = re.search(r"(?<![0-9a-z])([1-8])[-_ ]?steps?(?![a-z])", name)
    found = next((part for part in parts if part in WORDS), counted.group(0) if counted else "")
    return f"its name ({found})" if found else ""


def by_files(index: dict[str, Any], scheduler: dict[str, Any]) -> str:
    """What `model_index.json` and the scheduler's config say; empty if nothing."""
    if index.get("is_distilled") is True:
        return "its index (is_distilled)"
    kind = str(scheduler.get("_class_name", ""))
    if kind in SCHEDULERS:
        return f"its scheduler ({kind})"
    if table := next((key for key in TABLES if isinstance(scheduler.get(key), list)), ""):
        return f"its scheduler ({table}, a table)"
    terminal = scheduler.get("shift_terminal")
    return f"its scheduler (shift_terminal {terminal:g})" if isinstance(terminal, float) and terminal > LAST else ""
