"""What every preset takes of a card, counted, and what `--vram` makes of it: python benchmarks/memory.py

Before: as peft multiplies LoRA and with whole calls of the network run again for the gradient, which is what `gradient checkpointing` was
here until version 0.1's memory section. Nothing is measured: see on_a_card.py for that.
"""

from __future__ import annotations

import json
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

from diffalign import config as configs
from diffalign.errors import UserError
from diffalign.models import lora
from diffalign.models.products import make_lean
from diffalign.planning import architectures, vram
from diffalign.planning.demand import GIB, demand
from diffalign.planning.facts import Facts, facts

CARDS = (8, 12, 16, 24, 48, 80)


@cache
def of(name: str, lean: bool) -> Facts:
    """A preset's facts, with our products or peft's."""
    lora.make_lean = make_lean if lean else lambda module: None
    return facts(configs.load(name))


def preset(name: str) -> dict[str, Any]:
    """One preset's row."""
    own = configs.load(name)
    vram.facts = lambda _: of(name, True)
    before = demand(configs.load(name, ["memory.checkpoint=spans", "speed=eager"]), of(name, False)).total
    row: dict[str, Any] = {
        "preset": name,
        "model": own.model,
        "before": round(before / GIB, 1),
        "now": round(demand(own, of(name, True)).total / GIB, 1),
        "cards": {},
    }
    for card in CARDS:
        try:
            _, fit = vram.fitted(name, (), card)
            row["cards"][card] = {"counted": round(fit.demand.total / GIB, 1), **fit.chosen}
        except UserError as error:
            row["cards"][card] = None
            row["least"] = float(error.problems[0].partition("takes ")[2].partition(" GiB")[0])
    return row


def short(chosen: dict[str, Any] | None) -> str:
    """A card's settings in a table's cell."""
    if chosen is None:
        return "-"
    names = {"memory.quantize": "", "optimizer.micro_batch": "mb ", "memory.encode_on": "encode on "}
    told = [f"{names[key]}{value}" for key, value in chosen.items() if key in names]
    return ", ".join(told) or "as it is"


def main() -> None:
    """All presets of models on the hub."""
    rows = [preset(name) for name in configs.presets() if configs.load(name).model in architectures.known()]
    result = {"date": date.today().isoformat(), "what": "GiB, counted, not measured", "rows": rows}
    (Path(__file__).parent / "results" / "memory.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"| preset | before | now | {' | '.join(f'{card} GiB' for card in CARDS)} |")
    print("|---" * (3 + len(CARDS)) + "|")
    for row in rows:
        cells = [short(row["cards"][card]) for card in CARDS]
        print(f"| {row['preset']} | {row['before']} | {row['now']} | {' | '.join(cells)} |")
    for card in CARDS:
        before, now = sum(r["before"] <= card for r in rows), sum(r["cards"][card] is not None for r in rows)
        print(f"{card} GiB: before {before}, now {now} of {len(rows)}")


if __name__ == "__main__":
    main()
