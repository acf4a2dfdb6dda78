"""What the pages of docs/families/ show, counted as `diffalign plan --vram` counts: python benchmarks/families.py [PRESET...]

Nothing is measured and no weight is loaded. A slow test counts one of them again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from diffalign import config as configs
from diffalign.errors import UserError
from diffalign.planning import cost, vram
from diffalign.planning.facts import facts

CARDS = (8, 12, 16, 24, 48)
PRESETS = (
    *("ddpo/sd15", "ddpo/sdxl", "flow_grpo/sd35-medium", "flow_grpo/flux-dev"),
    *("flow_grpo/z-image", "flow_grpo/qwen-image", "flow_grpo/wan21", "flow_grpo/ltx-video"),
)
RESULTS = Path(__file__).parent / "results" / "families.json"


def preset(name: str) -> dict[str, Any]:
    """One preset: parameters in millions, an update's work, and what `--vram` says of each card."""
    config = configs.load(name)
    found = facts(config)
    vram.facts = lambda _: found  # once a preset
    update = cost.count(config, found)
    cards: dict[str, list[str]] = {}
    for card in CARDS:
        try:
            cards[str(card)] = vram.verdict(card, vram.fitted(name, (), card)[1])
        except UserError as error:
            cards[str(card)] = [error.problems[0]]
    return {
        "preset": name,
        "denoiser": round((found.linear + found.other) / 1e6, 1),
        "encoders": round(found.encoders / 1e6, 1),
        "trained": round(update.trained / 1e6, 2),
        "rows": update.rows_forward,
        "rows_backward": update.rows_backward,
        "samples": update.samples,
        "pflop": round((update.flops + update.decode_flops) / 1e15, 2),
        "cards": cards,
    }


if __name__ == "__main__":
    names = sys.argv[1:] or PRESETS
    before = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    counted = {name: preset(name) for name in names}
    RESULTS.write_text(json.dumps({**before, **counted}, indent=1) + "\n")
