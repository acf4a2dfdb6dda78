"""Short forms of a config, written out: one word where that is all there is to say."""

from __future__ import annotations

from typing import Any

# section -> the key that a text alone means
MEANT = {"rule": "name", "prompts": "source"}


def written_out(raw: dict[str, Any]) -> dict[str, Any]:
    """`rule: ddpo`, `prompts: mine.txt`, `rewards: pickscore` or `[pickscore, ocr]`, `eval_rewards: clipscore`, `output: {trackers: wandb}`
    in full. What is in full, or wrong, stays as it is."""
    found = dict(raw)
    for section, key in MEANT.items():
        if isinstance(raw.get(section), str):
            found[section] = {key: raw[section]}
    rewards = raw.get("rewards")
    names = [rewards] if isinstance(rewards, str) else rewards
    if (
        isinstance(names, list)
        and names
        and all(isinstance(name, str) for name in names)
        and len(set(names)) == len(names)
    ):
        found["rewards"] = dict.fromkeys(names, 1.0)
    if isinstance(raw.get("eval_rewards"), str):
        found["eval_rewards"] = [raw["eval_rewards"]]
    output = raw.get("output")
    if isinstance(output, dict) and isinstance(output.get("trackers"), str):
        found["output"] = {**output, "trackers": [output["trackers"]]}
    return found
