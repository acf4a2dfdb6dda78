"""The learning rate by update."""

from __future__ import annotations

import math


def factor(schedule: str, update: int, warmup: int, updates: int) -> float:
    """What the learning rate is multiplied by in update number `update` (0 is the first) of `updates`.

    It grows as (update + 1) / (warmup + 1) over the first `warmup` updates, is 1 at update `warmup`, and then stays ("constant") or falls
    towards 0, which update number `updates` would have: as 1 - p ("linear") or (1 + cos(pi p)) / 2 ("cosine"), with
    p = (update - warmup) / (updates - warmup).
    """
    if update < warmup:
        return (update + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    p = min((update - warmup) / max(updates - warmup, 1), 1.0)
    return 1 - p if schedule == "linear" else (1 + math.cos(math.pi * p)) / 2
